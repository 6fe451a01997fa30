"""A batch on several machines: Ray Data hands blocks of tasks to a pool of workers, each with the model open.

Rows and results pass through this process, which alone writes: so results of one machine and of many are the same file,
with the same promise. What Ray adds are the workers: it starts them, does the blocks of lost ones again elsewhere, and
starts more as nodes come.
"""

import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

from ..errors import Error
from ..pipeline.actors import cause, connected, nodes_for
from .answers import Answer, answers
from .tasks import Task

if TYPE_CHECKING:
    from ..generate.model import Model

_BLOCK = 32  # tasks that are lost with a worker, and handed to one at once
_BLOCKS = 4  # of them that a worker has at work: as many rows as a model has room for
_LOOK_SECONDS = 900.0  # for nodes to open the model, kernels compiled first
_DEATHS = 3  # workers in a row that may fail to start, as on a node with too little memory


class Cluster:
    """The workers of a cluster.

    Parameters
    ----------
    ray : module
    path : str
        The model's file, the same on all nodes.
    digest : str
        The model's.
    how : mapping
        For `Model`. Each worker has `n_threads`, by default as many as the smallest node has processors.
    """

    def __init__(self, ray: Any, path: str, digest: str, how: Mapping[str, Any]):
        self._ray, self._path, self._digest, self._how = ray, path, digest, dict(how)
        self._nodes = nodes_for(ray, self._how.get("n_threads"), 1)
        if self._how.get("n_threads") is None:
            if not self._nodes:
                raise Error("the Ray cluster has no node with a processor yet; n_threads (-t) says how many a worker takes")
            self._how["n_threads"] = int(min(n["Resources"]["CPU"] for n in self._nodes))

    def check(self) -> None:
        """Sees to it that each node has this version of ggpy and this model. `Worker` does so on nodes that come later.

        Raises
        ------
        Error
            One hasn't; says which.
        """
        from ray.exceptions import GetTimeoutError, NodeDiedError, RayError, TaskUnschedulableError
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        from .. import __version__

        look = self._ray.remote(num_cpus=0, max_retries=0)(_look)
        on = [look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(n["NodeID"], False)) for n in self._nodes]
        found = [on_node.remote(self._path, self._how) for on_node in on]
        for node, ref in zip(self._nodes, found, strict=True):
            name = f"node {node['NodeManagerAddress']}"
            try:
                version, seen, error = self._ray.get(ref, timeout=_LOOK_SECONDS)
            except (TaskUnschedulableError, NodeDiedError):  # the node has just gone
                continue
            except (RayError, GetTimeoutError) as failed:
                raise Error(f"{name}: {cause(failed)}") from None
            if version == __version__ and error:
                raise Error(f"{name}: {error}")
            _check_same(name, version, __version__, self._path, seen == self._digest)

    def answers(self, tasks: Iterator[Task]) -> Iterator[list[tuple[Task, Answer]]]:
        """The answers to tasks, in any order, block by block."""
        from ray.data import ActorPoolStrategy, DataContext
        from ray.exceptions import RayError

        from .. import __version__

        waiting: dict[int | str, Task] = {}
        blocks = []
        while block := list(islice(tasks, _BLOCK)):
            waiting.update((task.id, task) for task in block)
            blocks.append({"tasks": pickle.dumps(block)})
        if not blocks:
            return
        context = DataContext.get_current()
        context.enable_progress_bars = False
        context.max_consecutive_actor_init_deaths = _DEATHS
        n_threads = self._how["n_threads"]
        n_workers = sum(int(n["Resources"]["CPU"] // n_threads) for n in self._nodes)
        pool = ActorPoolStrategy(
            min_size=1,
            initial_size=max(1, min(n_workers, len(blocks))),
            max_tasks_in_flight_per_actor=2 * _BLOCKS,
            max_concurrent_calls_per_actor=_BLOCKS,
            enable_true_multi_threading=True,
        )
        found = self._ray.data.from_items(blocks, override_num_blocks=len(blocks)).map_batches(
            Worker,
            batch_size=1,
            compute=pool,
            num_cpus=n_threads,
            fn_constructor_args=(self._path, self._how, __version__, self._digest),
        )
        try:
            for batch in found.iter_batches(batch_size=None, prefetch_batches=0):
                for data in batch["answers"]:
                    # A block that was done twice counts once.
                    yield [(waiting.pop(id), answer) for id, answer in pickle.loads(data) if id in waiting]
        except RayError as error:
            raise Error(f"Ray: {cause(error)}; the same command goes on") from None
        if waiting:
            raise Error(f"Ray: {len(waiting)} rows have no answer; the same command goes on")


@contextmanager
def cluster(address: str, model: "Model", how: Mapping[str, Any]) -> Iterator[Cluster]:
    """The workers of the cluster at an address, all with this model.

    Raises
    ------
    Error
        There is no such cluster, or a node has another version of ggpy or another model.
    """
    with connected(address) as ray:
        found = Cluster(ray, str(model.file.path.resolve()), model.digest, how)
        found.check()
        yield found


class Worker:
    """A model, open in a process of Ray's. Blocks come in several threads, and the model computes them together.

    Parameters
    ----------
    path : str
    how : mapping
        For `Model`.
    version, digest : str
        ggpy's and the model's, as the calling process has them.

    Raises
    ------
    Error
        This node has others.
    """

    def __init__(self, path: str, how: Mapping[str, Any], version: str, digest: str):
        from ray.util import get_node_ip_address

        from .. import __version__, load

        self._model = load(path, **how)
        _check_same(f"node {get_node_ip_address()}", __version__, version, path, self._model.digest == digest)

    def __call__(self, batch: Mapping[str, Sequence[bytes]]) -> dict[str, list[bytes]]:
        """The answers to blocks of tasks."""
        found = []
        for data in batch["tasks"]:
            pairs = [pair for some in answers(self._model, pickle.loads(data)) for pair in some]
            found.append(pickle.dumps([(task.id, answer) for task, answer in pairs]))
        return {"answers": found}


def _check_same(node: str, version: str, own: str, path: str, is_same_model: bool) -> None:
    """Raises Error if a node has another version of ggpy than the calling process, or another model."""
    if version != own:
        raise Error(f"{node} has ggpy {version}, this process {own}")
    if not is_same_model:
        raise Error(f"{node}: {path} is another model there")


def _look(path: str, how: Mapping[str, Any]) -> tuple[str, str, str]:
    """The version of ggpy on a node, the digest of the model there, and what went wrong."""
    from .. import __version__, load

    try:
        with load(path, **how) as model:
            return __version__, model.digest, ""
    except (Error, OSError, MemoryError) as error:
        return __version__, "", str(error) or type(error).__name__

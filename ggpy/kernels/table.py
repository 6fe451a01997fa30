"""What kernels exist: name -> the module that defines it and the names of its parameters.

A kernel is called by `nth` threads at once as `kernel(ith, nth, params)`; `params` is the address of its parameters, one
int64 each, in the order given here (a float32 stands in the low half). Conventions for the names:

- `state` is the address of the run's state (`STATE`), `counter` that of an int64, zero when the run starts, through which
  threads share out work;
- sizes are counted in values unless they end in `_bytes`; strides (`*_stride`) are in bytes.

The sources define the kernels with the same parameter names; `source.kernel` checks that they agree.
"""

from typing import NamedTuple

#: int64 slots of the state that a run's rows have: how many rows there are; then, of a run's tokens, the *spans* that they
#: form (tokens of one sequence, one after the other), how many spans have one token (they come first), and the addresses of
#:
#: - spans, int32 (n_spans, 5): first token, tokens, positions before them, first of their entries in `pages`, slot;
#: - places, int32 (n_tokens,): page * SLAB + position in the page, where each token's keys and values go;
#: - pages, int32: the numbers of the spans' pages, one span's after the other's.
STATE = ("n_rows", "n_spans", "n_single", "spans", "places", "pages")
SPAN_BYTES = 20  # of a span in `spans`


#: int64 slots of a team's shared memory (see `tape`), in lines that its threads don't share without need
SYNC_LINE = 8
SYNC_ARRIVALS = 0
SYNC_SLEEPERS, SYNC_SPINS, SYNC_MOST_SPINS, SYNC_SYSCALL = range(1, 5)  # how threads wait for them; see `waiting`
SYNC_CALLS, SYNC_ENDING = SYNC_LINE, SYNC_LINE + 1
SYNC_REQUEST = 2 * SYNC_LINE  # the four parameters of `run_tape`
SYNC_BASE, SYNC_YIELD, SYNC_TAKE, SYNC_RELEASE = range(SYNC_REQUEST + 4, SYNC_REQUEST + 8)
SYNC_WORKERS = 3 * SYNC_LINE  # a line for each; in it:
SYNC_ASLEEP, SYNC_LOCK = 0, 1


class Kernel(NamedTuple):
    """Where a kernel's source is, and its parameters."""

    module: str
    params: tuple[str, ...]


#: weight types with integer kernels -> the format of the activations that they are multiplied with
QUANTIZED = {
    "Q4_0": "q8_32",
    "Q4_1": "q8_32",
    "Q5_0": "q8_32",
    "Q5_1": "q8_32",
    "Q8_0": "q8_32",
    "Q2_K": "q8_256",
    "Q3_K": "q8_256",
    "Q4_K": "q8_256",
    "Q5_K": "q8_256",
    "Q6_K": "q8_256",
    "IQ4_NL": "q8_32",
    "IQ4_XS": "q8_256",
    "MXFP4": "q8_32",
    "TQ1_0": "q8_256",
    "TQ2_0": "q8_256",
    "IQ1_S": "q8_256",
    "IQ1_M": "q8_256",
    "IQ2_XXS": "q8_256",
    "IQ2_XS": "q8_256",
    "IQ2_S": "q8_256",
    "IQ3_XXS": "q8_256",
    "IQ3_S": "q8_256",
}
#: kinds of GELU, and those with a factor
GELUS = ("tanh", "erf", "quick")
GEGLUS = ("tanh", "erf")
#: weight types that are multiplied in float32
FLOAT = ("F32", "F16", "BF16")

_ROPE = ("x", "table", "out", "state", "n_head", "head_dim", "n_rot", "x_stride", "x_head_stride")
_QUANTIZE = ("x", "out", "state", "n_cols", "n_rows_per_token", "x_stride", "x_row_stride", "out_stride")
_MUL_MAT = (
    *("w", "x", "out", "residual", "ids", "groups", "scratch", "scratch_stride", "counter", "state"),
    *("n_slots", "n_rows", "n_cols", "w_stride", "x_stride", "x_slot_stride", "out_stride", "out_slot_stride"),
)


#: columns of a few rows that are unpacked and multiplied at a time
PANEL = 512


#: tokens that a matrix product with AVX2 takes at a time where it has a token to a lane
TOKENS_AT_ONCE = 128


def scratch_bytes(type_name: str, n_tokens: int, row_bytes: int, n_cols: int, lanes: int) -> int:
    """Bytes that each thread of a matrix product needs beside its operands: PANEL columns of LANES rows unpacked, a copy of
    the last rows where n_rows isn't a multiple of LANES, and sums of n_tokens tokens (a multiple of 16); with AVX2 also
    activations of TOKENS_AT_ONCE tokens."""
    vectors = 12 if type_name in QUANTIZED else 32  # for 32 columns
    unpacked = vectors * 4 * lanes * (PANEL // 32)
    by_tokens = min(n_tokens, TOKENS_AT_ONCE) * activation_bytes(n_cols) if type_name in QUANTIZED and lanes == 8 else 0
    return unpacked + (lanes * row_bytes + 63) // 64 * 64 + 4 * lanes * max(n_tokens, TOKENS_AT_ONCE) + by_tokens


def activation_bytes(n_cols: int) -> int:
    """Bytes of one token's quantized activations: what q8_256 takes, of the two formats the longer; see `activations`."""
    return (n_cols + n_cols // 64 + 3 * n_cols // 8 + 63) // 64 * 64


#: experts that a router can have
MOST_EXPERTS = 1024
#: heads that one work item of attention takes at most, and its most rows: queries of a token and a head
HEADS_PER_ITEM = 16
ROWS_PER_ITEM = 96
#: types that the KV cache can have
KV_TYPES = ("F16", "Q8_0", "F32")
#: keys that are attended to before what they give is merged with what came before: parts of the same keys, merged in the
#: same order, whatever the threads and the number of tokens
KEYS_PER_PART = 256
#: positions that stand together in the KV cache: a page
SLAB = 64


#: `n_before` and `n_after` of attention where all keys before or behind a token are seen
NO_LIMIT = 1 << 30


def padded(n: int) -> int:
    """Values of a row with those of the zeros behind it that make it a multiple of 16."""
    return (n + 15) // 16 * 16


def attention_scratch(head_dim: int, head_dim_v: int) -> int:
    """Bytes that each thread needs in attention; see `attention.rows_of`."""
    head_dim, head_dim_v = padded(head_dim), padded(head_dim_v)
    rows = ROWS_PER_ITEM * (head_dim + 2 * head_dim_v + 20 + 2 * SLAB)
    return 4 * (rows + SLAB * max(head_dim, head_dim_v))


def split_spans(n_tokens: int, items_per_token: int, n_threads: int) -> int:
    """How many of a run's spans of one token may be shared out by parts: see `attention.is_split`."""
    return min(n_tokens, -(-ITEMS_PER_THREAD * n_threads // items_per_token))


#: work items that each thread should have at least, so that none waits long for another
ITEMS_PER_THREAD = 4


#: values of a head that stand together in the state of a delta rule; see `states`
STATE_COLUMNS = 32


#: types with encoders
ENCODED = (
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ4_NL", "IQ4_XS", "MXFP4", "TQ1_0", "TQ2_0"),
)


def _kernels() -> dict[str, Kernel]:
    table = {
        "run_tape": Kernel("tape", ("tape", "n_ops", "sync", "profile")),
        "run_team": Kernel("tape", ("tape", "n_ops", "sync", "profile", "run_tape", "done")),
        "end_team": Kernel("tape", ("sync",)),
        "wait_for_work": Kernel("tape", ("sync", "run_tape", "spins")),
        "read_memory": Kernel("limits", ("address", "n_bytes", "out")),
        "multiply_int8": Kernel("limits", ("n", "out")),
        "rms_norm": Kernel(
            "rows", ("x", "w", "out", "state", "n_cols", "n_rows_per_token", "x_stride", "out_stride", "eps")
        ),
        "add": Kernel("rows", ("x", "y", "out", "state", "n_cols")),
        "mul": Kernel("rows", ("x", "y", "out", "state", "n_cols")),
        "add_bias": Kernel("rows", ("x", "y", "out", "state", "n_cols")),
        "mul_row": Kernel("rows", ("x", "y", "out", "state", "n_cols")),
        "swiglu": Kernel("rows", ("x", "y", "out", "state", "n_cols")),
        "swiglu_clamped": Kernel("rows", ("x", "y", "out", "state", "n_cols", "alpha", "limit")),
        "relu_squared": Kernel("rows", ("x", "out", "state", "n_cols")),
        "soft_cap": Kernel("rows", ("x", "out", "state", "n_cols", "cap")),
        "layer_norm": Kernel("rows", ("x", "w", "bias", "out", "state", "n_cols", "n_rows_per_token", "eps")),
        "pad_rows": Kernel("rows", ("x", "out", "state", "n_cols", "n_rows_per_token", "x_row_stride", "n_padded")),
        "soft_max": Kernel("rows", ("x", "out", "state", "n_cols")),
        "scale": Kernel("rows", ("x", "out", "state", "n_cols", "factor")),
        "clamp": Kernel("rows", ("x", "out", "state", "n_cols", "limit")),
        "rows": Kernel("rows", ("x", "rows", "out", "state", "n_cols")),
        "rope_norm": Kernel("rope", _ROPE),
        "rope_neox": Kernel("rope", _ROPE),
        "join_heads": Kernel(
            "join", ("x", "y", "out", "state", "n_head", "n_x", "n_y", "x_head_stride", "y_stride", "y_head_stride")
        ),
        "attention_merge": Kernel(
            "attention", ("partial", "sinks", "out", "state", "n_head", "head_dim", "n_before", "items_per_token")
        ),
        "route": Kernel(
            "moe",
            (
                *("logits", "bias", "out", "state", "n_expert", "n_used"),
                *("sigmoid", "normalize", "factor", "n_group", "n_group_used"),
            ),
        ),
        "group_by_expert": Kernel("moe", ("route", "out", "state", "n_expert", "n_used")),
        "gather_rows": Kernel("moe", ("x", "groups", "out", "n_expert", "per_row", "row_bytes")),
        "add_expert_bias": Kernel("moe", ("x", "bias", "route", "out", "state", "n_expert", "n_used", "n_cols")),
        "combine": Kernel("moe", ("x", "route", "out", "state", "n_used", "n_cols")),
        "sigmoid_gate": Kernel("moe", ("x", "gate", "out", "state", "n_cols")),
        "gated": Kernel("rows", ("x", "gate", "out", "state", "n_cols", "n_rows_per_token", "gate_stride")),
        "l2_norm": Kernel("rows", ("x", "out", "state", "n_cols", "n_rows_per_token", "x_stride", "eps")),
        "short_conv": Kernel(
            "states", ("x", "w", "bias", "tails", "out", "counter", "state", "n_cols", "width", "slot_stride", "silu_after")
        ),
        "delta_gates": Kernel("states", ("decay", "beta", "a", "dt", "out", "state", "n_head")),
    }
    for name in ("delta_rule", "state_scan"):
        params: tuple[str, ...] = (
            *(
                "queries",
                "keys",
                "values",
                "gates",
                "memory",
                "skip",
                "out",
                "counter",
                "state",
                "n_head",
                "n_head_k",
                "tiled",
            ),
            *("head_dim_k", "head_dim", "key_stride", "value_stride", "slot_stride", "scale"),
        )
        table[name] = Kernel("states", params)
    work = ("out", "partial", "scratch", "scratch_stride", "state", "counter")
    for name in GELUS:
        table[f"gelu_{name}"] = Kernel("rows", ("x", "out", "state", "n_cols"))
    for name in GEGLUS:
        table[f"geglu_{name}"] = Kernel("rows", ("x", "y", "out", "state", "n_cols"))
    for name in KV_TYPES:
        for part in "kv":
            params = ("x", "cache", "scratch", "scratch_stride", "state", "n_head_kv", "head_dim")
            table[f"store_{part}_{name}"] = Kernel("attention", params)
        params = ("latent", "k_rot", "cache", "scratch", "scratch_stride", "state", "n_latent", "n_rot")
        table[f"store_latent_{name}"] = Kernel("latent", params)
        params = ("q", "k_cache", "v_cache", "sinks", *work, "n_head", "n_head_kv", "head_dim", "head_dim_v", "scale")
        params += ("cap", "n_before", "n_after")
        table[f"attention_{name}"] = Kernel("attention", params)
        params = ("q_latent", "q_rot", "cache", *work, "n_head", "n_latent", "n_rot", "scale")
        table[f"latent_attention_{name}"] = Kernel("latent", params)
    for name in ("q8_32", "q8_256"):
        table[f"quantize_{name}"] = Kernel("activations", _QUANTIZE)
        params = ("x", "w", "out", "state", "n_cols", "x_stride", "out_stride", "eps")
        table[f"rms_norm_{name}"] = Kernel("activations", params)
        params = ("x", "y", "out", "state", "n_cols", "n_rows_per_token", "out_stride")
        table[f"swiglu_{name}"] = Kernel("activations", params)
    for name in (*QUANTIZED, *FLOAT):
        family = "matmul_int8" if name in QUANTIZED else "matmul_float"
        table[f"mul_mat_one_{name}"] = Kernel(family, _MUL_MAT)
        table[f"mul_mat_{name}"] = Kernel(family, _MUL_MAT)
        table[f"get_rows_{name}"] = Kernel("get_rows", ("w", "ids", "out", "state", "n_rows", "n_cols"))

    # Encoders: `importance` is 0 or the address of n_cols float32.
    for name in ENCODED:
        table[f"encode_{name}"] = Kernel("encode", ("x", "importance", "out", "counter", "n_rows", "n_cols"))

    return table


KERNELS = _kernels()

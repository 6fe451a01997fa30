"""The process of a stage: python -m ggpy.pipeline DESCRIPTOR does what comes over a connection until that ends."""

import os
import sys
from multiprocessing.connection import Connection

from ..errors import Error
from .stage import Stage


def main() -> None:
    """Answers each message that wants an answer, and an error with its words and the end."""
    with Connection(int(sys.argv[1])) as connection:
        try:
            stage = Stage(connection.recv())
            connection.send(("ready", stage.caches))
            while True:
                message = connection.recv()
                result = stage.do(message)
                if result is not None:
                    connection.send(("done", result))
        except (EOFError, ConnectionError):  # whom it works for has ended
            pass
        except (Error, OSError, MemoryError) as error:
            connection.send(("error", str(error) or type(error).__name__))
    os._exit(0)  # threads of a team needn't end


if __name__ == "__main__":
    main()

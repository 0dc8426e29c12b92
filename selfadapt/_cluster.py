"""Work that is shared among the processes of a dask cluster."""

from collections.abc import Callable, Generator, Sequence
from importlib import import_module
from itertools import islice
from typing import Any, TypeVar

from selfadapt._errors import ConfigError, OutputError, SelfAdaptError, first_line

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 2
"""So many items per worker are out at a time: one at work, one waiting."""


class Cluster:
    """The workers of an existing cluster.

    Args:
        client: a `distributed.Client`, or the address of a scheduler.

    Raises:
        ConfigError: distributed is not installed, or this leads to no workers.
    """

    def __init__(self, client: Any) -> None:
        try:
            distributed: Any = import_module("distributed")
        except ModuleNotFoundError:
            raise ConfigError(
                "work on a cluster needs distributed: pip install 'selfadapt[dask]'"
            ) from None
        self._is_ours = isinstance(client, str)
        if self._is_ours:
            try:
                client = distributed.Client(client)
            except (OSError, ValueError) as error:
                raise ConfigError(
                    f"there is no scheduler at {client!r} ({first_line(error)})."
                ) from None
        if not isinstance(client, distributed.Client) or client.asynchronous:
            raise ConfigError(
                f"client={client!r} is not allowed: give a distributed.Client (not an asynchronous "
                "one), or the address of a scheduler."
            )
        if not client.nthreads():
            raise ConfigError(f"the cluster of {client} has no workers: start some first.")
        self._client, self._as_completed = client, distributed.as_completed

    def map(
        self, work: Callable[[Item], Result], items: Sequence[Item]
    ) -> Generator[tuple[Item, Result], None, None]:
        """Each item with what `work` makes of it, as they are done.

        `work` is sent to each worker once. What is out is given up when this ends early.

        Raises:
            ConfigError: `work` cannot be sent.
            OutputError: the cluster has lost an item. Errors of ours come as they are.
        """
        client, waiting = self._client, iter(items)
        try:
            sent = client.scatter(work, broadcast=True, hash=False)
        except Exception as error:  # each library's pickling raises its own
            raise ConfigError(
                f"the network or the image cannot be sent to other processes: {first_line(error)}"
            ) from None
        out = {
            client.submit(_work, sent, item, pure=False): item
            for item in islice(waiting, AHEAD * len(client.nthreads()))
        }
        done = self._as_completed(list(out))
        try:
            for future in done:
                item = out.pop(future)
                try:
                    result = future.result()
                except Exception as error:  # a worker was killed, or has other versions
                    raise OutputError(
                        f"the cluster fails at {item} ({first_line(error)}): what is finished is "
                        "kept for resume=True, --resume."
                    ) from error
                if isinstance(result, SelfAdaptError):
                    raise result
                yield item, result
                for following in islice(waiting, 1):
                    more = client.submit(_work, sent, following, pure=False)
                    out[more] = following
                    done.add(more)
        finally:
            client.cancel(list(out))
            if self._is_ours:
                client.close()


def _work(work: Callable[[Item], Result], item: Item) -> Result | SelfAdaptError:
    """What the user can mend is no failure of the cluster, which would log it at length."""
    try:
        return work(item)
    except SelfAdaptError as error:
        return error

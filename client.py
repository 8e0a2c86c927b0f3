"""The client: a Python class for programs, and a command line for people.

    python client.py clip_classify photo.jpg --topk 3
    python client.py clip_embed "a red bicycle"
    python client.py clip_image_embed ~/Photos --out vectors.npz --discover

`LumenClient` talks to one daemon, `infer_many` shares work among several, `discover` finds them by mDNS. To use the
client in another project, copy this file, `client_connections.py`, `client_files.py` and `gen/`. They need `grpcio` and
`protobuf`. numpy (for .npz), tqdm (for the progress bar) and zeroconf (for --discover) are imported where needed.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

if __name__ == "__main__":  # gRPC reads this at import; its log must not appear beside the client's messages
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    if importlib.util.find_spec("grpc") is None:  # usually another Python than intended
        print(f"client.py: grpcio is not installed for {sys.executable}; run .venv/bin/python", file=sys.stderr)
        sys.exit(2)

import client_files as files
from client_connections import (
    AS_TENSOR,
    DEFAULT_ADDRESS,
    Credentials,
    LumenClient,
    LumenError,
    Request,
    Result,
    full_address,
    infer_many,
    read_credentials,
)
from client_files import OutputError, UsageError

__all__ = ["Credentials", "LumenClient", "LumenError", "Request", "Result", "UsageError", "discover", "infer_many"]
SERVICE_TYPE, DISCOVERY_SECONDS = "_lumen._tcp.local.", 3.0

log = logging.getLogger("lumen.client")


def discover(seconds: float = DISCOVERY_SECONDS, tls: bool = False) -> list[str]:
    """The addresses of all daemons that answer on mDNS within `seconds`, in the order of their names.

    `LUMEN_MDNS_INTERFACE` is the IPv4 address of the interface to search on; the default is all. Daemons whose use of
    TLS differs from `tls` are left out with a warning. Raises LumenError if none is left.
    """
    try:
        from zeroconf import IPVersion, ServiceBrowser, Zeroconf
    except ImportError:
        raise LumenError("unavailable", "--discover needs the zeroconf package") from None
    names: list[str] = []
    interface = os.environ.get("LUMEN_MDNS_INTERFACE")
    options: dict[str, Any] = {"interfaces": [interface]} if interface else {}
    browser = Zeroconf(ip_version=IPVersion.V4Only, **options)
    addresses = []
    try:
        ServiceBrowser(browser, SERVICE_TYPE, handlers=[lambda name, **_: names.append(name)])
        time.sleep(seconds)
        for name in sorted(set(names)):
            if not (info := browser.get_service_info(SERVICE_TYPE, name, 1000)):
                continue
            address = f"{info.parsed_addresses(IPVersion.V4Only)[0]}:{info.port}"
            if (b"tls" in info.properties) == tls:
                addresses.append(address)
            else:
                log.warning("%s: left out: it uses %s", address, "no TLS" if tls else "TLS; see --ca and --tls")
    finally:
        browser.close()
    if not addresses:
        advice = "start one, or give --address"
        raise LumenError("unavailable", f"no daemon answered on mDNS within {seconds:.0f} s; {advice}")
    return list(dict.fromkeys(addresses))


# --- command line -----------------------------------------------------------------------------------------------


def find_daemons(options: argparse.Namespace) -> list[str]:
    """The addresses of the daemons, without duplicates. Raises UsageError or LumenError."""
    if not options.discover:
        given = ",".join(options.address or [os.environ.get("LUMEN_ADDRESS") or DEFAULT_ADDRESS]).split(",")
        return list(dict.fromkeys(full_address(address.strip()) for address in given))
    found = discover(tls=options.tls)
    print(f"client.py: found {', '.join(found)}", file=sys.stderr)
    return found


def ask(
    clients: Sequence[LumenClient],
    task: str,
    inputs: Iterable[str],
    meta: Mapping[str, str],
    read: Callable[[str, str], tuple[bytes, str]] = files.read_input,
) -> Iterator[tuple[str, Result | LumenError]]:
    """Sends the inputs; yields (input, its answer) in their order.

    A thread reads each input when it is about to be sent. An input that cannot be read gets an error as its answer.
    """
    drawn: deque[tuple[str, LumenError | None]] = deque()  # inputs that have no answer yet; why they cannot be read

    def requests() -> Iterator[Request]:
        for name in inputs:
            try:
                payload, mime = read(task, name)
            except Exception as error:  # any error here concerns this input only
                drawn.append((name, LumenError("invalid_argument", files.reason_of(error))))
            else:
                drawn.append((name, None))
                yield Request(task, payload, mime, meta)

    def unread() -> Iterator[tuple[str, LumenError]]:
        while drawn and (error := drawn[0][1]):
            yield drawn.popleft()[0], error

    for answer in infer_many(clients, requests()):
        yield from unread()
        yield drawn.popleft()[0], answer
    yield from unread()


def take_heic(clients: Sequence[LumenClient], task: str) -> bool:
    """Whether every daemon that answers takes HEIC pictures. Raises LumenError if none answers."""
    taken: list[bool] = []
    failed = None
    for client in clients:
        try:
            taken.append(files.reads_heic(client.capabilities(), task))
        except LumenError as error:
            failed = error
    if failed and not taken:
        raise failed
    return all(taken)


def run_task(clients: Sequence[LumenClient], options: argparse.Namespace) -> int:
    """Sends every input and writes the answers; returns 1 if one failed. Raises LumenError, UsageError or OSError."""
    inputs, skipped = options.inputs, 0
    if options.task in files.TEXT_TASKS:
        files.warn_of_pictures(options.task, inputs)
    else:
        inputs, skipped = files.image_paths(inputs, lambda: take_heic(clients[:: options.streams], options.task))
    meta, failed = files.request_meta(options), 0
    if options.task.endswith("_embed"):
        meta |= AS_TENSOR
    with files.open_output(options.out, options.task, options.json, len(inputs) > 1) as output:
        for name, answer in files.progress(ask(clients, options.task, inputs, meta), len(inputs)):
            shown = files.readable(name)
            if isinstance(answer, LumenError):
                if answer.message.startswith("meta "):  # an option is wrong, so all other answers would be the same
                    raise answer
                failed += 1
                print(f"client.py: {shown}: {answer.message}", file=sys.stderr)
                output.add({"input": shown, "error": answer.message})
            else:
                output.add(files.row_of(shown, answer.data, answer.meta))
    if skipped:
        print(f"client.py: {files.heic_note(skipped)}", file=sys.stderr)
    return 1 if failed else 0


def report(error: LumenError, sources: Sequence[str]) -> None:
    """One line that names the daemons, unless the error does so itself."""
    named = any(source in error.message for source in sources)
    print(f"client.py: {'' if named else ', '.join(sources) + ': '}{error}", file=sys.stderr)


def show_health(client: LumenClient, as_json: bool) -> bool:
    """Prints the state of the daemon; returns whether it is serving. Raises LumenError."""
    state, degraded = client.health(), []
    try:
        degraded = client.degraded()
    except LumenError as error:
        if error.code != "unauthenticated":  # without the token, only the state is public
            raise
    files.print_health(state, degraded, as_json)
    return state == "SERVING"


def show(clients: Sequence[LumenClient], options: argparse.Namespace) -> int:
    """Prints the state or the capabilities of each daemon; returns 1 if one fails or is not serving."""
    well = True
    for client in clients:
        if len(clients) > 1 and not options.json:
            print(f"{client.address}:")
        try:
            if options.task == "health":
                well &= show_health(client, options.json)
            else:
                for capability in client.capabilities():
                    files.print_capability(capability, options.json)
        except LumenError as error:
            report(error, [client.address])
            well = False
    return 0 if well else 1


def main(arguments: Sequence[str] | None = None) -> int:
    options = files.build_parser().parse_intermixed_args(arguments)
    options.tls = any((options.tls, options.ca, options.cert, options.server_name))
    logging.basicConfig(level=logging.WARNING, format="client.py: %(message)s")
    if isinstance(sys.stdout, io.TextIOWrapper):  # a character that the terminal cannot show must not stop the run
        sys.stdout.reconfigure(errors="backslashreplace")
    addresses: list[str] = []
    try:
        files.check_options(options)
        addresses = find_daemons(options)
        credentials = read_credentials(options, addresses)
        with ExitStack() as stack:
            clients = [
                stack.enter_context(LumenClient(address, options.timeout, credentials, options.streams > 1))
                for address in addresses
                for _ in range(options.streams)
            ]
            if options.task in ("capabilities", "health"):
                return show(clients[:: options.streams], options)
            return run_task(clients, options)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it at exit, which must not fail
        return 1
    except UsageError as error:
        print(f"client.py: {error}", file=sys.stderr)
        return 2
    except LumenError as error:
        report(error, addresses or ["mDNS"])
    except (OSError, OutputError) as error:
        print(f"client.py: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    return 1


if __name__ == "__main__":
    sys.exit(main())

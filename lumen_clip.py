"""lumen-clip: CLIP and BioCLIP-2 over gRPC (`home_native.v1.Inference`), batched across all clients.

The way of one request:

    stream's reader thread     chunks -> one whole Request         (streams: Stream; chunks: Assembler)
    decode threads             bytes -> pixels or token ids        (intake: Intake; decode_pool; tasks: prepare)
    the engine's thread        the task's steps, in true batches   (engine: Engine; tasks)
    inference thread, workers  a batch through a model             (engine: Engine; a backend)
    stream's own thread        responses, in the requests' order   (streams: Stream)

This file starts, serves and stops. `main()` reads and checks the settings, opens the ports, advertises the daemon as
loading, loads the models, and then reports to mDNS and systemd that it is ready.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import logging
import os
import queue
import re
import shutil
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

if __name__ == "__main__" and importlib.util.find_spec("grpc") is None:  # usually another Python than intended
    print(f"lumen-clip: grpcio is not installed for {sys.executable}; run .venv/bin/python", file=sys.stderr)
    sys.exit(2)

import backends
import label_cache
import labels
import logs
import machine
import metrics
import tree_of_life
from discovery import Advertiser
from engine import Engine
from errors import BackendError, LabelError, SettingError, unreadable
from journal import Journal
from label_files import PROMPTS, OperatorSets, SceneSet, read_scenes
from labels import LabelSet
from machine import clock
from model import Model
from model_files import EXPORTED_LABELS, Encode, Say, encoder_of, quiet
from security import check_immich_port
from service import Daemon, start_server
from settings import VERSION, Settings, demo_environment
from species import Species
from species_loader import SpeciesLoader
from tasks import Models

log = logging.getLogger("lumen")

DRAIN_S = 20  # seconds that requests in progress have after the daemon is told to stop
LINGER_S = 0.2  # seconds between the last message and the end of the process, which closes the connections at once
TRAFFIC_LOG_S = 60  # seconds between two log lines about the traffic
PROGRESS_LOG_S = 30  # seconds between two log lines about the progress of a start, if there is no terminal
SILENCE_S = 300  # seconds without progress after which systemd stops a start
# Seconds that the first start may take for all prompts of the labels of `clip_classify`. If they would take longer, it
# computes one prompt each, and the rest in the background: 7,000 take 28 s on two cores, and minutes on a board.
PROMPTS_S = 10.0
FIRST_PROMPTS = "first-prompts"  # folder of the vectors that are used until then
OLD_CLASSES = "clip/*_imagenet_vectors.npz"  # caches of the first version, below the data folder
SEMANTIC_NOTICE = (
    "Photo apps route these tasks by name alone: no other node on this network should offer them with another model, "
    "or vectors of two models end up in one index."
)
MEMORY_LOOK_S = 0.25  # seconds; a network of 1 Gbit/s brings 30 MB in this time
MEMORY_FLOOR = 64 << 20  # bytes that must stay available, or a twenty-fifth of all memory if that is more

Loaded = tuple[Models, SpeciesLoader | None]  # the loader is None if the species are loaded already
# The models or why they cannot be loaded; SIGTERM for an orderly stop, SIGHUP to read the label sets again.
Events = queue.SimpleQueue[Loaded | BaseException | signal.Signals]


# --- before the start -------------------------------------------------------------------------------------------


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "lumen_clip.py",
        description="CLIP and BioCLIP-2 over gRPC. Settings come from the environment; see docs/settings.md.",
    )
    parser.add_argument("--port", type=int, default=50051, help="0 takes a free one (default: 50051)")
    parser.add_argument("--host", default="0.0.0.0", help="address to listen on (default: all, IPv4 and IPv6)")
    parser.add_argument(
        "--demo",
        action="store_true",
        help="serve the small demo model in gen/demo; mDNS is off unless CLIP_MDNS_TYPE is set",
    )
    parser.add_argument("--doctor", action="store_true", help="check this machine and the settings, and exit")
    parser.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    parser.add_argument("--log-format", default="text", choices=("text", "json"))
    parser.add_argument("--version", action="version", version=f"lumen-clip {VERSION}")
    parsed = parser.parse_args(arguments)
    if not 0 <= parsed.port <= 65535:
        parser.error(f"--port {parsed.port}: allowed: 0 to 65535")
    parsed.host = parsed.host.strip("[]")
    return parsed


def prepare_process(options: argparse.Namespace) -> None:
    """Log, memory and what libraries may print; before any of them begins."""
    # The level of --log-level is for the daemon. Libraries log warnings and errors only.
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.root.handlers[0].addFilter(logs.RepeatLimiter())
    # Pillow warns of each broken EXIF entry. "always" because the other actions keep every text in memory.
    warnings.filterwarnings("always", module=r"PIL\.")
    logging.captureWarnings(True)
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # otherwise gRPC writes a line for each abnormal client
    machine.use_one_heap()
    if options.log_format == "json":
        logging.root.handlers[0].setFormatter(logs.JSONFormatter())
    elif logs.stderr_is_journal():
        logging.root.handlers[0].setFormatter(logs.JournalFormatter())
    if options.log_format == "json" or not sys.stderr.isatty():
        os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # progress bars are for terminals
    log.setLevel(options.log_level.upper())


class Terminal:
    """The terminal that the daemon was started in, if any. When it closes, the daemon must stop."""

    def __init__(self) -> None:
        self._missing = 0 if self._is_open() else 2  # how many times in a row it was not found

    def look(self) -> None:
        """Call this every few seconds: a daemon that has outlived its terminal does not stop because of it any more."""
        self._missing = 0 if self._is_open() else self._missing + 1

    def has_closed(self) -> bool:
        """Whether the terminal has closed since it was last looked for."""
        return self._missing < 2 and not self._is_open()

    @staticmethod
    def _is_open() -> bool:
        try:
            os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
        except OSError:
            return False
        return True


def handle_signals(events: Events, journal: Journal, terminal: Terminal) -> None:
    """SIGTERM and SIGINT: the first asks for an orderly stop, the second ends the process at once.

    SIGHUP has the label sets read again. A terminal that closes sends it as well, and then it asks for an orderly stop.

    A handler in Python runs on the main thread, which may learn of a signal only when its current wait ends, seconds
    later. So a thread of its own reads the signals' numbers from a pipe.
    """
    numbers = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        log.info("SIGHUP is ignored, as nohup asks: label sets are read at the start only")
    else:
        numbers.append(signal.SIGHUP)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in numbers:
        signal.signal(number, lambda *_: None)  # without a handler nothing is written to the pipe

    def read() -> None:
        stopping = False
        while True:
            number = os.read(reading, 1)[0]
            if number == signal.SIGHUP and (stopping or not terminal.has_closed()):
                events.put(signal.SIGHUP)
            elif number in numbers:
                if stopping:
                    journal.close()  # to stop is not to crash
                    _leave(0)
                stopping = True
                events.put(signal.SIGTERM)

    threading.Thread(target=read, name="signals", daemon=True).start()


def complain(error: Exception) -> int:
    """Prints one line for the operator; -> the exit status, 2 for what the operator has to change.

    In the journal, which names us by itself, the line has an error's priority. lumen-clip.service does not start the
    daemon again after a 2.
    """
    print("<3>" if logs.stderr_is_journal() else "lumen-clip: ", error, sep="", file=sys.stderr)
    return 2 if isinstance(error, SettingError) else 1


def notify(state: str) -> None:
    """Tells systemd, when it has started us (sd_notify's one datagram)."""
    if path := os.environ.get("NOTIFY_SOCKET"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(state.encode(), "\0" + path[1:] if path.startswith("@") else path)


def run_doctor(options: argparse.Namespace, environment: Mapping[str, str]) -> int:
    try:
        import doctor
    except ImportError:
        print("lumen-clip: --doctor: doctor.py is not here; copy it beside lumen_clip.py", file=sys.stderr)
        return 2
    return doctor.run(environment, options.host, options.port)


def check(settings: Settings) -> None:
    """Checks that the packages and files that the settings name are there. Downloads nothing. Raises SettingError."""
    for options in settings.models().values():
        backends.check_modules(options)
        backends.check_sources(options)
    try:
        read_scenes(settings.lumen_scenes)
        own = settings.clip.labels if "clip" in settings.models() else ""
        if own and not Path(own).is_fifo():  # a named pipe can be read once only
            labels.class_names(settings.lumen_data_dir, own, quiet)
        if "bioclip" in settings.models():
            tree_of_life.check_own(settings.bioclip.labels)
    except PermissionError as error:
        raise unreadable(error) from error


# --- start ------------------------------------------------------------------------------------------------------


def serve_immich(daemon: Daemon, host: str) -> Callable[[float], None]:
    """Opens the port for immich; -> what waits up to so many seconds for its last answers. Raises SettingError."""
    port = daemon.settings.lumen_immich_port
    if not port:
        return lambda seconds: None
    check_immich_port(daemon.settings, host)
    try:
        import immich  # aiohttp takes 9 MB

        return immich.ImmichServer(daemon, host, port).drain
    except ModuleNotFoundError as error:
        text = f"{error.name} is not installed here; pip install -r requirements-immich.txt"
    except OSError as error:
        text = error.strerror or str(error)
    raise SettingError(f"LUMEN_IMMICH_PORT={port}: {text}")


def load_in_background(daemon: Daemon, done: Callable[[Loaded | BaseException], None]) -> None:
    """Loads on its own thread, so that signals and RPCs are heard meanwhile."""
    logged = time.monotonic()

    def say(text: str) -> None:
        nonlocal logged
        daemon.loading = text
        notify(f"EXTEND_TIMEOUT_USEC={SILENCE_S * 1_000_000}\nSTATUS={text}")
        if not sys.stderr.isatty() and time.monotonic() - logged > PROGRESS_LOG_S:
            logged = time.monotonic()
            log.info("%s", text)

    def load() -> None:
        try:
            done(load_models(daemon.settings, daemon.engine, say))
        except PermissionError as error:
            done(unreadable(error) if error.filename else error)
        except BaseException as error:
            done(error)

    threading.Thread(target=load, name="load", daemon=True).start()


def load_models(settings: Settings, engine: Engine, say: Say) -> Loaded:
    """Loads what the settings ask for; `say` is told what is being done.

    Species that are not at hand are left to the loader. Raises SettingError, BackendError or LabelError.
    """
    loader: SpeciesLoader | None = None
    loaded: dict[str, Model | None] = {"clip": None, "bioclip": None}
    sets: dict[str, LabelSet | Species] = {}
    operator_sets = None
    complete: Callable[[Models], None] | None = None
    scenes = read_scenes(settings.lumen_scenes)  # before anything that takes long
    notices: list[str] = []
    for name, options in settings.models().items():
        # Clients are told this too: a file's name, and not where it lies.
        where = "" if options.model.startswith("hf-hub:") else "[^:]*/"
        say(f"loading {re.sub(where, '', options.model)} ({options.backend})")
        backend = backends.create_backend(options, say)
        folder = settings.lumen_data_dir / name / backend.runtime / backend.model_id.replace("/", "--")
        model = loaded[name] = Model(backend, name, engine, options.max_batch_size or settings.batch_size)
        model.adapt(folder if settings.lumen_tune else None, engine, options.max_batch_size)
        log.info(
            "%s: %s on %s, %d dimensions, %s", name, backend.model_id, backend.runtime, backend.dim, backend.precision
        )
        if backend.notice and backend.notice not in notices:
            notices.append(backend.notice)
            log.warning("%s: %s", backend.model_id, backend.notice)
        if name == "clip":
            encode = encoder_of(backend)
            sets["classes"], complete = _classes(model, engine, folder, settings, say)
            if "bioclip" in settings.models():
                vectors = labels.label_vectors(scenes.choices.texts(), PROMPTS, encode)
                sets["scenes"] = SceneSet(scenes, vectors, backend.logit_scale)
            templates = labels.TEMPLATES[settings.clip_templates]
            operator_sets = OperatorSets(settings.lumen_data_dir / "labels", folder / "labels", backend, templates)
            operator_sets.read(encode, compute=False)
            continue
        loader = SpeciesLoader(options.labels, model, folder, settings.lumen_data_dir, engine)
        if species := loader.at_once(say):
            sets["species"], loader = species, None
            # Only bioclip_embed asks for it from here on, and BioCLIP-2's takes half a gigabyte. People who search do
            # so with CLIP's, which stays.
            if settings.lumen_semantic != name:
                backend.unload_text()
    if settings.lumen_semantic:
        log.info("semantic tasks: %s. %s", settings.lumen_semantic, SEMANTIC_NOTICE)
    models = Models(
        engine, loaded["clip"], loaded["bioclip"], sets, settings.batch_size, operator_sets, settings.lumen_semantic
    )
    if complete:
        threading.Thread(target=complete, args=(models,), name="labels", daemon=True).start()
    return models, loader


def _classes(
    model: Model, engine: Engine, folder: Path, settings: Settings, say: Say
) -> tuple[LabelSet, Callable[[Models], None] | None]:
    """What `clip_classify` chooses from; `folder` keeps what belongs to this model on this runtime.

    If the labels have one prompt each for now (see PROMPTS_S), the function computes all of them in the background, and
    replaces the labels.
    """
    own, backend = settings.clip.labels, model.backend
    names = labels.class_names(settings.lumen_data_dir, own, say)
    recipe_of = labels.names_recipe if own else labels.imagenet_recipe
    recipe, older = recipe_of(settings.clip_templates), sorted(settings.lumen_data_dir.glob(OLD_CLASSES))
    say(f"text vectors of {len(names)} labels for {backend.model_id}")

    def key_of(recipe: labels.Recipe) -> label_cache.CacheKey:
        return label_cache.CacheKey.of(names, recipe, backend.model_id, backend.dim)

    def label_set(found: label_cache.TextVectors) -> LabelSet:
        return LabelSet(names, found.vecs, backend.logit_scale, backend.hold_rows(found.vecs))

    def computed(recipe: labels.Recipe, encode: Encode, folder: Path, say: Say) -> LabelSet:
        def progress(done: int, total: int) -> None:
            say(f"computing text vectors for {backend.model_id}: {done} of {total} labels")

        return label_set(label_cache.cached_vectors(folder, names, recipe, encode, key_of(recipe), older, progress))

    def complete(models: Models) -> None:
        began = time.monotonic()
        try:
            models.replace_classes(computed(recipe, model.encoder(engine), folder, quiet))
        except Exception:
            log.exception("the labels of clip_classify keep one prompt each")
            return
        shutil.rmtree(folder / FIRST_PROMPTS, ignore_errors=True)
        log.info("the labels of clip_classify have all their prompts, after %.0f s", time.monotonic() - began)

    encode = encoder_of(backend)
    if backend.folder:  # its manifest's checksums say that all in it belongs to the model
        exported = backend.folder / EXPORTED_LABELS / label_cache.FILE
        if found := label_cache.load_or_none(exported, key_of(recipe).meta()):
            return label_set(found), None
    kept = older or (folder / label_cache.FILE).exists()
    if settings.clip_templates == 1 or kept or _seconds_of(names, recipe, encode) <= PROMPTS_S:
        return computed(recipe, encode, folder, say), None
    return computed(recipe_of(1), encode, folder / FIRST_PROMPTS, say), complete


def _seconds_of(names: Sequence[str], recipe: labels.Recipe, encode: Encode) -> float:
    """How long the text vectors of the labels take, estimated from a few of them."""
    few = names[:: max(1, len(names) // 8)]
    began = time.monotonic()
    labels.label_vectors(few, recipe, encode)
    return (time.monotonic() - began) * len(names) / len(few)


# --- serve ------------------------------------------------------------------------------------------------------


def serve(daemon: Daemon, advertiser: Advertiser, models: Models, loader: SpeciesLoader | None) -> None:
    """Starts serving the loaded models, and reports it to systemd, mDNS and the log."""
    daemon.serve(models)
    if loader:
        loader.in_background(models, lambda text: notify(f"STATUS={text}"))
    advertiser.set_ready(next(daemon.GetCapabilities(None, None)).runtime)
    threading.Thread(target=look_after_memory, args=(daemon,), name="memory", daemon=True).start()
    machine.trim_memory()
    gc.freeze()  # what stays need not be looked through again and again
    notify("READY=1\nSTATUS=serving")
    log.info("ready: %s", ", ".join(task.name for task in models.offered()))


def look_after_memory(daemon: Daemon) -> None:
    """Keeps messages that are on their way from taking what the machine has left; a thread's work."""
    while True:
        time.sleep(MEMORY_LOOK_S)
        left, of = machine.memory()
        floor = max(MEMORY_FLOOR, of // 25)
        if left < floor:
            machine.trim_memory()
            left, _ = machine.memory()
        if left < floor and (ended := daemon.make_room()):
            log.warning("memory is short (%d MB left): ended %d streams that waited for messages", left >> 20, ended)


def supervise(daemon: Daemon, events: Events, terminal: Terminal) -> str:
    """Waits for the signal to stop and looks after the streams meanwhile; -> "" or what is wrong with inference.

    The watchdog of systemd is reset only while inference makes progress: if a driver hangs, only a restart helps.
    """
    watchdog = int(os.environ.get("WATCHDOG_USEC", "0")) / 2e6
    beat = min(5.0, watchdog or 5.0, daemon.settings.lumen_hang_s / 2)
    clock.tick(beat)
    while True:
        with suppress(queue.Empty):
            if events.get(timeout=beat) is signal.SIGTERM:
                return ""
            daemon.reload()
        clock.tick(beat)
        terminal.look()
        daemon.check()
        machine.trim_memory()
        daemon.traffic.log_summary(TRAFFIC_LOG_S)
        if trouble := daemon.trouble():
            return trouble
        if watchdog:
            notify("WATCHDOG=1")


# --- stop -------------------------------------------------------------------------------------------------------


def stop(daemon: Daemon, advertiser: Advertiser, drain_immich: Callable[[float], None]) -> None:
    """Answers the requests in progress first. The caller then ends the process, which closes all connections.

    `grpc.Server.stop` would end calls that arrive at that moment with CANCELLED. A connection that closes is
    UNAVAILABLE, which tells clients to try again.
    """
    notify("STOPPING=1")
    log.info("stopping: answering the requests in progress")
    advertiser.close()
    until = time.monotonic() + DRAIN_S
    daemon.drain(DRAIN_S)
    drain_immich(until - time.monotonic())
    time.sleep(LINGER_S)
    daemon.journal.close()
    daemon.traffic.log_summary(0)
    log.info("stopped")


def _leave(status: int) -> NoReturn:
    """Ends the process while a load may be deep in native code, which an orderly exit would wait for."""
    sys.stderr.flush()
    os._exit(status)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    prepare_process(options)
    environment = demo_environment(os.environ) if options.demo else os.environ
    if options.doctor:
        return run_doctor(options, environment)
    journal = Journal()
    events: Events = queue.SimpleQueue()
    terminal = Terminal()
    handle_signals(events, journal, terminal)
    try:
        settings = Settings.from_environment(environment)
        check(settings)
        daemon = Daemon(settings, journal)
        if settings.lumen_metrics_port:
            metrics.serve(daemon.traffic, options.host, settings.lumen_metrics_port)
        drain_immich = serve_immich(daemon, options.host)
        _server, port = start_server(daemon, options.host, options.port)  # kept, else gRPC stops it
    except (SettingError, OSError) as error:
        return complain(error)
    journal.open(settings.lumen_data_dir)
    log.info("listening on %s port %d; loading models", options.host, port)
    load_in_background(daemon, events.put)
    advertiser = Advertiser(settings, options.host, port)
    while (event := events.get()) is signal.SIGHUP:
        pass  # the label sets are read when the models are there
    if not isinstance(event, tuple):
        advertiser.close()
    if isinstance(event, signal.Signals):
        log.info("stopped while loading")
        _leave(0)
    if isinstance(event, SettingError | BackendError | LabelError):
        _leave(complain(event))
    if isinstance(event, BaseException):
        log.critical("loading the models failed", exc_info=event)
        _leave(1)
    serve(daemon, advertiser, *event)
    if trouble := supervise(daemon, events, terminal):
        log.critical("%s; the process ends, so that a supervisor can start it again", trouble)
        daemon.drain(0)
        advertiser.close()
        time.sleep(LINGER_S)
        _leave(1)  # the requests in progress can no longer be answered
    stop(daemon, advertiser, drain_immich)
    _leave(0)


if __name__ == "__main__":
    sys.exit(main())

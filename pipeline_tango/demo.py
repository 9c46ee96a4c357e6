"""The `tango-demo` command: a page to generate sounds on, on this machine or as a Hugging Face Space."""

import logging
import os
import signal
import socket
import tempfile
import threading
from contextlib import suppress
from importlib.util import find_spec

from . import TANGO_TINY, __version__
from .__main__ import CommandError, Parser, is_number, is_whole, release, say, stop


MEGABYTE = 2**20


def parse_arguments(argv):
    parser = Parser(
        prog="tango-demo",
        description="Serve a page on this machine to generate sounds on, and its functions for programs.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"tango-demo {__version__}")
    model = parser.add_argument_group("the model")
    model.add_argument(
        "--model",
        metavar="FOLDER_OR_REPO",
        default=TANGO_TINY,
        help="what tango --model takes (default: tango-tiny, which comes with the package)",
    )
    model.add_argument("--lora", metavar="FOLDER_OR_REPO", help="LoRA weights that the page starts with")
    model.add_argument(
        "--models",
        metavar="DIR",
        help="also offer the models and LoRA weights in the subfolders of this folder (default: only those given)",
    )
    model.add_argument(
        "--allow_repos", action="store_true", help="let everybody at the page load any repo of the Hub, by its name"
    )
    model.add_argument("--device", help="as tango --device")
    model.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="as tango --dtype"
    )
    server = parser.add_argument_group("the server")
    server.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0 lets other machines in (default: %(default)s, this machine only)",
    )
    server.add_argument("--port", type=int, default=7860, metavar="N", help="(default: %(default)s)")
    server.add_argument("--share", action="store_true", help="also make a public address by Gradio's service")
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--max_seconds",
        type=float,
        default=120.0,
        metavar="S",
        help="longest sound, given or made (default: 120)",
    )
    limits.add_argument("--max_upload", type=float, default=20.0, metavar="MB", help="largest upload (default: 20)")
    limits.add_argument(
        "--queue", type=int, default=16, metavar="N", help="requests that wait at most; more are refused (default: 16)"
    )
    args = parser.parse_args(argv)
    checks = [
        ("port", is_whole(args.port, 0, 65535), "a whole number from 0 to 65535"),
        ("max_seconds", is_number(args.max_seconds, 1, 3600), "a number of seconds from 1 to 3600"),
        ("max_upload", is_number(args.max_upload, 0.01, 1000), "a number of megabytes from 0.01 to 1000"),
        ("queue", is_whole(args.queue, 1, 1000), "a whole number from 1 to 1000"),
        ("models", args.models is None or os.path.isdir(args.models), "a folder"),
        ("model", args.model, "a folder or a Hub repo"),
    ]
    for name, is_valid, accepted in checks:
        if not is_valid:
            raise CommandError(f"{name} must be {accepted}, got {getattr(args, name)!r:.100}")
    for library in ("gradio", "matplotlib", "soundfile"):
        if not find_spec(library):
            raise CommandError(f'the page needs {library}: pip install "pipeline-tango[demo]"')
    return args


def launch(args):
    """Start the server in the background. Its files are in the folder `GRADIO_TEMP_DIR`.

    Returns:
        `gr.Blocks`, whose `close()` ends it, and its address.
    """
    from .demo_model import DemoModel
    from .demo_page import STYLE, Page

    limits = {"max_seconds": args.max_seconds}
    model = DemoModel(
        args.model, args.lora, args.models, args.allow_repos, device=args.device, dtype=args.dtype, **limits
    )
    blocks = Page(model).blocks
    blocks.queue(max_size=args.queue, api_open=False)  # no way past the queue
    _, url, _ = blocks.launch(
        server_name=args.host,
        server_port=args.port or free_port(args.host),
        share=args.share,
        max_file_size=round(args.max_upload * MEGABYTE),
        prevent_thread_lock=True,
        quiet=True,
        css=STYLE,
        footer_links=["api"],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
    )
    return blocks, url


def free_port(host):
    with socket.create_server((host, 0)) as server:
        return server.getsockname()[1]


def main(argv=None):
    """Run the command until Ctrl-C or SIGTERM. Returns the exit status: 0, 1 (failed) or 2 (invalid arguments)."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        args = parse_arguments(argv)
    except SystemExit as exit:  # --help and --version
        return exit.code
    except CommandError as error:
        say(f"error: {error}")
        return 2
    before = None
    if threading.current_thread() is threading.main_thread():  # elsewhere handlers cannot be set
        before = signal.signal(signal.SIGTERM, stop)
    try:
        return serve(args)
    except KeyboardInterrupt as interrupt:  # Ctrl-C and SIGTERM
        release(interrupt)
        say("stopped")
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
    return 0


def serve(args):
    """Serve the page until interrupted. Returns the exit status if that fails."""
    with tempfile.TemporaryDirectory(prefix="tango-demo-", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # before Gradio is imported: uploads and results, removed at the end
        try:
            blocks, url = launch(args)
        except Exception as error:
            say(f"error: {' '.join(str(error).split())[:500] or type(error).__name__}")
            return 1
        try:
            say(f"{url} (end with Ctrl-C)")
            threading.Event().wait()
        finally:
            with suppress(Exception):
                blocks.close(verbose=False)


if __name__ == "__main__":
    raise SystemExit(main())

import os
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vision_ssm.cli.options import parse_options
from vision_ssm.cli.use import RunOptions, load_run
from vision_ssm.engine.output import make_console
from vision_ssm.engine.run_folder import weights_file
from vision_ssm.errors import InputError
from vision_ssm.recipes.config import limited


@dataclass(frozen=True, kw_only=True)
class DemoOptions(RunOptions):
    """Serve a web page that predicts for pictures, and shows receptive fields and attention where they are clicked."""

    host: str = "127.0.0.1"
    """Address to listen at; by default only this machine reaches it, 0.0.0.0 is for everybody."""
    port: int = limited(7860, least=1, most=65535)
    """Port to listen at."""
    max_pixels: int = limited(40_000_000, least=1)
    """Largest number of pixels of a picture."""
    max_megabytes: float = limited(20.0, above=0)
    """Largest size of its file."""


def demo(words: Sequence[str]) -> int:
    """Serve a web page; `words` follow `vision-ssm demo`."""
    options: DemoOptions = parse_options(DemoOptions, words, "demo")
    path = weights_file(options.run, options.weights)
    _check_free(options.host, options.port)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = os.environ["GRADIO_RUN_HISTORY"] = "False"
    import gradio  # says that it is missing before the model is loaded

    from vision_ssm.export import demo as make_page

    task, asked = load_run(path, options, optimized=False)  # an optimized copy has no gradients
    limits: dict[str, Any] = dict(max_pixels=options.max_pixels, max_megabytes=options.max_megabytes)
    page = make_page(task, title=options.run.absolute().name, **limits, **asked)
    how: dict[str, Any] = dict(
        server_name=options.host, server_port=options.port, share=False, ssr_mode=False, quiet=True
    )
    # Up to ten times the limit the page itself says in its own words that a file is too large.
    how |= dict(max_file_size=int(10e6 * options.max_megabytes), prevent_thread_lock=True, footer_links=[])
    page.launch(**how, theme=gradio.themes.Default(font="system-ui", font_mono="monospace"))
    make_console().out(f"{page.local_url} shows {task.summary}; Ctrl-C stops it", highlight=False)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        page.close(verbose=False)
    return 0


def _check_free(host: str, port: int) -> None:
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        raise InputError(
            f"cannot listen at {host}, port {port}: {error.strerror or error}; see --host, --port"
        ) from None

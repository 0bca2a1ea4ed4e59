"""The page of `mfuser serve`: a photograph in, its mask, confidence and likeness to words out.

It is served to this machine alone (127.0.0.1) and fetches nothing from elsewhere; what is uploaded
lies in a temporary folder that goes when the page does.
"""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from mfuser.engine.environment import environment
from mfuser.engine.viewer import Seen, Viewer
from mfuser.errors import MFuserError, MissingExtraError

HOST = "127.0.0.1"
LARGEST = "500mb"
"""Maximum size of an upload."""
QUIET = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_SHARE": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
STYLE = """
footer { display: none !important }
.block:has(.image-container) [data-testid=block-label] { position: static; border: 0 }
#legend ul { list-style: none; margin: 0; padding: 0; columns: 2 }
#legend li { break-inside: avoid; margin: 0 0 .25em 0; font-size: .9em }
#legend i { display: inline-block; width: 1em; height: 1em; margin-right: .4em;
            vertical-align: -.15em; border: 1px solid rgba(128, 128, 128, .6) }
#legend b { white-space: nowrap; font-weight: 400; opacity: .7; font-variant-numeric: tabular-nums }
#about h1 { margin: 0; font-size: 1.4em; font-weight: 600 } #about p { margin: 0; opacity: .8 }
#said p { margin: 0 } #said p[role=alert] { color: #b3261e; font-weight: 600 }
.dark #said p[role=alert] { color: #ff8a80 }
"""


@contextmanager
def serving(viewer: Viewer, port: int) -> Iterator[str]:
    """Serve the page of a model until the block ends; yields its address. port: 0 for any.

    Raises MissingExtraError without Gradio, MFuserError where the port is taken.
    """
    port = _free(port)
    with (
        tempfile.TemporaryDirectory(prefix="mfuser-serve-") as uploads,
        environment({**QUIET, "GRADIO_TEMP_DIR": uploads}),
    ):
        gr = _gradio()
        page = _page(gr, viewer)
        system = ["system-ui", "sans-serif"]
        page.launch(
            server_name=HOST,
            server_port=port,
            share=False,
            inbrowser=False,
            prevent_thread_lock=True,
            quiet=True,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            enable_monitoring=False,
            footer_links=[],
            max_file_size=LARGEST,
            css=STYLE,
            theme=gr.themes.Default(
                primary_hue="indigo", font=system, font_mono=["ui-monospace", "monospace"]
            ),
        )
        try:
            yield f"http://{HOST}:{port}"
        finally:
            page.close(verbose=False)


def check_gradio() -> None:
    """Raises MissingExtraError without Gradio, before anything that takes time."""
    if find_spec("gradio") is None:
        raise MissingExtraError("gradio", "app", "the page of mfuser serve")


def _gradio() -> Any:
    check_gradio()
    import gradio

    return gradio


def _page(gr: Any, viewer: Viewer) -> Any:
    model = viewer.model
    about = (
        f"<h1>{escape(viewer.name)}</h1><p>{len(model.classes)} classes, window "
        f"{model.spec.image_size[0]}x{model.spec.image_size[1]}. Photographs stay on this "
        "machine.</p>"
    )
    shown = {"interactive": False, "buttons": ["download", "fullscreen"]}
    with gr.Blocks(title=f"mfuser: {viewer.name}", analytics_enabled=False) as page:
        gr.HTML(about, elem_id="about")
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                photo = gr.File(label="Photograph", elem_id="photo", height=130)
                said = gr.HTML(_paragraph("Drop a photograph above."), elem_id="said")
                text = gr.Textbox(
                    label="Where is it like these words?",
                    placeholder="a class name or any few words",
                    visible=viewer.reads_text,
                    elem_id="words",
                    submit_btn="Compare",
                )
                legend = gr.HTML(elem_id="legend")
            with gr.Column(scale=3):
                overlay = gr.Image(label="Mask over the photograph", elem_id="overlay", **shown)
                with gr.Row():
                    mask = gr.Image(label="Mask", format="png", elem_id="mask", **shown)
                    confidence = gr.Image(label="Confidence", elem_id="confidence", **shown)
                    likeness = gr.Image(
                        label="Likeness to the words",
                        elem_id="likeness",
                        visible=viewer.reads_text,
                        **shown,
                    )

        def look(file: str | None, words: str) -> tuple[Any, ...]:
            nothing = (None, None, None, None, "")
            if file is None:
                return (_paragraph("Drop a photograph above."), *nothing)
            path = Path(file)
            try:
                seen = viewer.look(path)
            except MFuserError as error:
                return (_alert(error, path), *nothing)
            found, like = _found(viewer, seen), None
            if words.strip():
                sentence, like = compare(file, words)
                found += sentence
            legend = _legend(viewer, seen)
            return found, seen.overlay, seen.mask, seen.confidence, like, legend

        def compare(file: str | None, words: str) -> tuple[str, np.ndarray | None]:
            if file is None:
                return _paragraph("Drop a photograph first.", alert=True), None
            if not words.strip():
                return _paragraph("Type a class name or a few words.", alert=True), None
            try:
                like = viewer.compare(Path(file), words.strip())
            except MFuserError as error:
                return _alert(error, Path(file)), None
            sentence = f"“{words.strip()}”: cosine from {like.least:.3f} to {like.most:.3f}."
            return _paragraph(sentence), like.picture

        outputs = [said, overlay, mask, confidence, likeness, legend]
        hidden = {"api_visibility": "private", "show_progress": "minimal"}
        photo.change(look, [photo, text], outputs, concurrency_id="model", **hidden)
        text.submit(compare, [photo, text], [said, likeness], concurrency_id="model", **hidden)
    return page


def _found(viewer: Viewer, seen: Seen) -> str:
    """Summarizes in a sentence what was done."""
    height, width = seen.size
    shown = seen.mask.shape[:2]
    small = f", shown and segmented at {shown[1]}x{shown[0]}" if shown != seen.size else ""
    return _paragraph(
        f"{width}x{height} pixels{small}; mean confidence {100 * seen.certainty:.0f} %."
    )


def _legend(viewer: Viewer, seen: Seen) -> str:
    """Every class that is there, and its share of the pixels."""
    rows = []
    for name, share in seen.shares.items():
        color = viewer.table[viewer.model.classes.index(name)]
        square = f'<i style="background: rgb({color[0]}, {color[1]}, {color[2]})"></i>'
        rows.append(f"<li>{square}{escape(name)} <b>{100 * share:.1f} %</b></li>")
    return f"<ul>{''.join(rows)}</ul>"


def _paragraph(text: str, alert: bool = False) -> str:
    return f"<p{' role=alert' if alert else ''}>{escape(text)}</p>"


def _alert(error: MFuserError, path: Path) -> str:
    """The error, with the file called as whoever uploaded it calls it."""
    return _paragraph(str(error).replace(str(path), path.name), alert=True)


def _free(port: int) -> int:
    """The port, or any free one for 0. Raises MFuserError where it cannot be had."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise MFuserError(
                f"port {port} of {HOST} cannot be used ({error.strerror}): give another --port, "
                "or 0 for any that is free"
            ) from error
        return int(probe.getsockname()[1])

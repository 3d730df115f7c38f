"""A page to try a trained run in the browser: thumbnails first, then images, variations, super-resolution, pyramids.

    pip install -e '.[demo]'
    python -m extras.demo                     the newest run in out/; without one it offers to train the digits
    python -m extras.demo RUN --port 7860     a run directory, an export, or OWNER/NAME on the hub

The page is gradio's; the work is that of extras/causal.py, for one person after the other. It listens on this machine
only unless --host says otherwise, and asks nothing of the network.
"""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import wraps
from html import escape
from pathlib import Path
from types import ModuleType, SimpleNamespace

import config
from config import UserError, explain
from data import conditions
from extras import causal, studio
from extras.studio import ENLARGED, FILM_SIDE, FILM_STEPS, VARIATIONS, Wish, figures, follow, note
from run import graphs, load
from run.load import Run

MOST = 60                                                   # thumbnails
DIGITS, FLAGS = Path("out/digits"), []                      # what train.py is asked for where there is no run


def import_gradio() -> ModuleType:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"        # before the import: it would ask for its newest version
    with explain("the page needs gradio", ": pip install -e '.[demo]'", ImportError):
        import gradio
    return gradio


@dataclass
class Shared:
    """What all visitors share: the trained run, once there is one."""

    run: Run | None = None
    device: str | None = None
    precision: str | None = None
    graphs: bool = False

    def open(self, name: str | None, **options) -> None:
        """Loads a run. Raises UserError when it cannot be shown."""
        run = load.load_run(name, device=self.device, **options)
        causal.check_run(run)
        run.ready()
        graphs.speed_up(run, load.solver_settings(run.cfg, SimpleNamespace(precision=self.precision)), self.graphs)
        self.run = run


def describe(run: Run | None) -> str:
    if run is None:
        return "no trained run yet"
    starts = ", ".join(f"{start:.2g}" for start in run.cfg.starts)
    return (f"{run.cfg.dataset}, {run.cfg.res} × {run.cfg.res}, bands from t = {starts}; "
            f"step {run.step:,} of {run.folder}")


def build(shared: Shared) -> object:
    """The page, a gradio.Blocks."""
    gr = import_gradio()
    with gr.Blocks(title="LapFlow", analytics_enabled=False, fill_width=True, delete_cache=(3600, 3600)) as page:
        drawn, chosen = gr.State(), gr.State()              # the Wish of the thumbnails; the number of the one clicked
        headline = gr.HTML(elem_id="headline")
        with gr.Row(elem_id="bar"):
            status = gr.HTML(note("ready"), elem_id="status")
            cancel = gr.Button("Cancel", scale=0, min_width=100)
        with gr.Column(visible=False) as training:
            start = gr.Button("Train the digits: two minutes on two CPU cores", variant="primary")
            loss = gr.HTML(elem_id="loss")
        with gr.Tabs() as tabs:
            with gr.Tab("Generate", visible=False, id="generate") as generate_tab, gr.Row():
                with gr.Column(scale=1, min_width=260):
                    classes = gr.Dropdown([], label="Classes", multiselect=True, info="empty: all in turn")
                    vectors = gr.Textbox("", label="Vector", info="numbers; empty: those of training, in turn")
                    num = gr.Slider(1, MOST, 20, step=1, label="Number")
                    with gr.Row():
                        seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=90)
                        guidance = gr.Number(1, label="Guidance", minimum=0, maximum=100, step=0.5, min_width=90)
                    with gr.Row():
                        solver = gr.Dropdown(list(config.SOLVERS), label="Solver", min_width=90)
                        steps = gr.Number(40, label="Steps", precision=0, minimum=1, maximum=1000, min_width=90)
                    draw = gr.Button("Draw thumbnails", variant="primary")
                with gr.Column(scale=4, min_width=300):
                    thumbnails = gr.Gallery(show_label=False, elem_id="thumbnails", format="png", allow_preview=False,
                                            interactive=False, buttons=[], height="auto", container=False)
                    with gr.Row():
                        with gr.Column(scale=2, min_width=260):
                            finished = gr.HTML(elem_id="finished")
                            with gr.Row(visible=False) as more:
                                vary_it = gr.Button(f"{VARIATIONS} variations", min_width=100)
                                watch_it = gr.Button("Watch it form", min_width=100)
                        with gr.Column(scale=3, min_width=260):
                            animation = gr.HTML(elem_id="animation")
                    varied = gr.HTML(elem_id="varied")
            with gr.Tab("Upsample", visible=False) as upsample_tab, gr.Row():
                with gr.Column(scale=1, min_width=260):
                    small = gr.File(label="A small picture", file_types=["image"], height=140, elem_id="small")
                    side = gr.Radio([], label="Shrunk to")
                    kind = gr.Dropdown([], label="Class", info="empty: all in turn")
                    up_seed = gr.Number(0, label="Seed", precision=0, minimum=0)
                    enlarge = gr.Button("Enlarge", variant="primary")
                with gr.Column(scale=4, min_width=300):
                    enlarged = gr.HTML(elem_id="enlarged")
            with gr.Tab("Pyramid", id="pyramid"), gr.Row():
                with gr.Column(scale=1, min_width=260):
                    photo = gr.File(label="A photograph", file_types=["image"], height=140, elem_id="photo")
                    scales = gr.Slider(1, 6, 3, step=1, label="Bands, K")
                with gr.Column(scale=4, min_width=300):
                    pyramid = gr.HTML(elem_id="pyramid")

        def configure() -> Iterator[dict]:
            """What the run offers: at every visit, and when the digits are trained."""
            run, there = shared.run, gr.update(visible=shared.run is not None)
            yield {headline: f"<h1>LapFlow</h1><span>{escape(describe(run))}</span>",
                   training: gr.update(visible=run is None), generate_tab: there, upsample_tab: there,
                   tabs: gr.update(selected="generate" if run else "pyramid"), pyramid: studio.split(None, 3)}
            if run is None:
                yield {status: note("There is no trained run yet: train the digits, or take a photograph apart.")}
                return
            names = run.classes if isinstance(run.condition, conditions.Labels) else []
            sides = [run.cfg.res >> k for k in reversed(range(1, run.cfg.num_scales))]
            can_guide = run.condition is not None and run.cfg.label_drop > 0
            yield {classes: gr.update(choices=names, visible=bool(names)),
                   kind: gr.update(choices=names, value=None, visible=bool(names)),
                   vectors: gr.update(visible=isinstance(run.condition, conditions.Vectors)),
                   guidance: gr.update(value=run.cfg.cfg_scale, visible=can_guide), solver: run.cfg.solver,
                   steps: gr.update(value=run.cfg.solver_steps or 40, visible=run.cfg.solver != "dopri5"),
                   side: gr.update(choices=[(f"{r} × {r} pixels", r) for r in sides], value=sides[0]),
                   thumbnails: gr.update(elem_classes=["blocks"] if sides[0] <= FILM_SIDE else [])}

        def train_the_digits() -> Iterator[dict]:
            if shared.run is None:                          # another visitor may have done it while this one waited
                with closing(studio.train(DIGITS, FLAGS)) as progress:
                    for html, curve in progress:
                        yield {status: html, loss: curve}
                shared.open(str(DIGITS))
            yield {status: note("the digits are trained")}
            yield from configure()

        def show_thumbnails(*asked) -> Iterator[dict]:
            if shared.run is None:
                yield {drawn: None}                         # a generator without any yield would empty the page
                return
            wish = studio.read_wish(shared.run, *asked)
            work = follow(shared.run, lambda run: studio.preview(run, wish), "thumbnails", status)
            (images, nfe), seconds = yield from work
            names = studio.captions(shared.run, wish)
            text = (f"{wish.num} thumbnails of {images.shape[1]} × {images.shape[2]} from the coarse band alone: {nfe} "
                    f"calls (NFE), {seconds:.2f} s. Click one to finish it.")
            cells = [(image.squeeze(), name) for image, name in zip(images, names, strict=True)]
            yield {drawn: wish, thumbnails: gr.update(value=cells, selected_index=None), finished: "", varied: "",
                   animation: "", more: gr.update(visible=False), status: note(text)}

        def show_finished(wish: Wish, event: gr.SelectData) -> Iterator[dict]:
            i = event.index
            work = follow(shared.run, lambda run: studio.finish(run, wish, i), f"image {i}", status)
            (images, nfe, gap), seconds = yield from work
            names = ("thumbnail", "finished")
            titles = [f"{name}, {len(image)} × {len(image)}" for name, image in zip(names, images, strict=True)]
            text = (f"image {i} finished: {nfe} calls (NFE), {seconds:.2f} s; averaged down, it differs from its "
                    f"thumbnail by {gap:.1g} at most (pixels go from -1 to 1)")
            yield {chosen: i, finished: figures(images, titles), varied: "", animation: "", status: note(text),
                   more: gr.update(visible=True)}

        def show_variations(wish: Wish, i: int) -> Iterator[dict]:
            work = follow(shared.run, lambda run: studio.vary(run, wish, i), "variations", status)
            (images, nfe), seconds = yield from work
            titles = [f"variation {k}" for k in range(1, VARIATIONS + 1)]
            text = f"{VARIATIONS} times image {i}: its thumbnail, new details; {nfe} calls (NFE), {seconds:.2f} s"
            yield {varied: figures(images, titles), status: note(text)}

        def show_film(wish: Wish, i: int) -> Iterator[dict]:
            html, seconds = yield from follow(shared.run, lambda run: studio.film(run, wish, i), "Euler steps", status)
            text = f"image {i} in {FILM_STEPS} Euler steps, {seconds:.2f} s: each band moves from its own start time"
            yield {animation: html, status: note(text)}

        def show_enlarged(file: str | None, width: int, label: str | None, seed: float | None) -> Iterator[dict]:
            cfg, pixels = shared.run.cfg, studio.read_upload(file, width)
            wish = studio.read_wish(shared.run, [label] if label else [], "", ENLARGED, seed, cfg.cfg_scale, cfg.solver,
                             cfg.solver_steps)
            (images, report), seconds = yield from follow(shared.run, lambda run: causal.upsample_picture(
                run, pixels, wish.num, wish.y, wish.seed, **wish.settings), "enlarging", status)
            names = studio.captions(shared.run, wish)
            titles = [f"input, {width} × {width}", "bicubic", *(f"LapFlow: {name}" for name in names)]
            text = (f"{width} → {cfg.res} pixels: {report['nfe']} calls (NFE), {seconds:.2f} s. Averaged down again, "
                    f"off by {report['rms_of_input']:.1f} of 255; bicubic {report['rms_of_input_bicubic']:.1f}")
            yield {enlarged: figures(images, titles), status: note(text)}

        def show_pyramid(file: str | None, num_scales: float) -> Iterator[dict]:
            yield {pyramid: studio.split(file, int(num_scales))}

        outputs, events = [block for block in page.blocks.values() if block is not page], []

        def when(trigger: Callable, handler: Callable, inputs: list = (), queue: str = "network") -> object:
            """Handlers yield {component: value}; a UserError becomes the status. Those of one queue take turns."""
            @wraps(handler)
            def one_sentence(*values):
                try:
                    yield from handler(*values)
                except UserError as problem:
                    yield {status: note(str(problem), "problem")}

            events.append(trigger(one_sentence, list(inputs), outputs, concurrency_id=queue, concurrency_limit=1,
                                  show_progress="minimal", show_progress_on=status, api_visibility="private"))
            return events[-1]

        ask = [classes, vectors, num, seed, guidance, solver, steps]
        when(when(page.load, configure).then, show_thumbnails, ask)
        when(when(start.click, train_the_digits).then, show_thumbnails, ask)
        when(draw.click, show_thumbnails, ask)
        when(thumbnails.select, show_finished, [drawn])
        when(vary_it.click, show_variations, [drawn, chosen])
        when(watch_it.click, show_film, [drawn, chosen])
        when(enlarge.click, show_enlarged, [small, side, kind, up_seed])
        for trigger in (photo.change, scales.change):
            when(trigger, show_pyramid, [photo, scales], "pyramid")
        solver.change(lambda name: gr.update(visible=name != "dopri5"), solver, steps, queue=False,
                      api_visibility="private")
        cancel.click(lambda: note("cancelled"), None, status, cancels=events, queue=False, api_visibility="private")
    return page


def launch(shared: Shared, host: str, port: int | None) -> object:
    """Starts the server in threads of its own; returns the page, whose local_url is its address."""
    gr, page, here = import_gradio(), build(shared), Path(__file__)
    theme = gr.themes.Base(primary_hue="blue", neutral_hue="gray", font=["system-ui", "sans-serif"],
                           font_mono=["ui-monospace", "monospace"])
    with explain(f"the page cannot be served on {host}", "; choose another --host or --port", OSError):
        socket.create_server((host, port or 0)).close()     # otherwise gradio tries a hundred ports
        page.queue(max_size=100).launch(
            server_name=host, server_port=port, theme=theme, css=here.with_suffix(".css").read_text(), quiet=True,
            head=f"<script>{here.with_suffix('.js').read_text()}</script>", footer_links=[], ssr_mode=False,
            prevent_thread_lock=True, max_file_size="50mb")
    return page


def main() -> None:
    parser = config.parser(__doc__, "python -m extras.demo [RUN] [options]")
    parser.add_argument("run", nargs="?", help="run directory, export, or OWNER/NAME on the hub [newest in out/]")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all networks [127.0.0.1]")
    parser.add_argument("--port", type=int, help="[the first that is free from 7860]")
    parser.add_argument("--vae", help="where the run's autoencoder is now, when it has moved")
    parser.add_argument("--raw", action="store_true", help="use the raw weights, not their moving average")
    parser.add_argument("--precision", choices=config.PRECISIONS, help="of the network [float32]")
    parser.add_argument("--graphs", action="store_true", help="replay CUDA graphs, recorded once for all visitors")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps [the best there is]")
    args = parser.parse_args()
    import_gradio()
    shared = Shared(device=args.device, precision=args.precision, graphs=args.graphs)
    if args.run or any(Path("out").glob("**/step-*.pt")):
        shared.open(args.run, raw=args.raw, vae=args.vae)
    page = launch(shared, args.host, args.port)
    print(f"{describe(shared.run)}\nopen       {page.local_url}    Ctrl-C stops it", flush=True)
    page.block_thread()


if __name__ == "__main__":
    config.run(main)

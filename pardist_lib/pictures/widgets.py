"""Live controls that also leave a picture in the saved notebook.

A widget lives as long as its kernel; GitHub, nbviewer, nbconvert and a notebook opened the next day have only what
was saved. So a control writes three outputs: a still picture; the widget; one line that says "run this cell".
Their style hides the still and the line while the widget is alive, and the widget's error message when it is not.

Sliders everywhere, also for choices: JupyterLab leaves the arrow keys to a slider, and takes them from a dropdown.
"""

from html import escape
from io import BytesIO

import ipywidgets
import numpy as np
from IPython.display import display
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont

from . import palette
from .figure import DPI, WIDTH, Picture, compress
from .values import count

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
# One output area holds, in this order: the still, the widget (class pardist-live), the line (class pardist-run).
HIDE = """<style>
.jp-OutputArea-child:has(+ .jp-OutputArea-child .pardist-live) { display: none; }
.jp-OutputArea-child:has(.pardist-live) + .jp-OutputArea-child:has(.pardist-run) { display: none; }
.jp-OutputArea-child:not(:has(.pardist-live)):has(+ .jp-OutputArea-child .pardist-run) { display: none; }
</style>"""
WHOLE_NAMES = {"description_width": "initial"}  # of controls: else the name is cut


class Live:
    """A widget with a still picture of it; shows both in the way the module describes.

    widget: the ipywidgets widget (of version 7 or 8); still: the `Picture` that stays; hint: what to do to bring it
    to life.
    """

    def __init__(self, widget, still, hint):
        self.widget, self.still, self.hint = widget, still, hint
        widget.add_class("pardist-live")

    def _ipython_display_(self):
        data, metadata = self.still._repr_mimebundle_()
        display(data, raw=True, metadata=metadata)
        view = {"version_major": 2, "version_minor": 0, "model_id": self.widget.model_id}
        display({WIDGET_VIEW: view, "text/plain": ""}, raw=True)
        line = f'{HIDE}<div class="pardist-run"><em>{escape(self.hint)}</em>{self.still.in_words()}</div>'
        display({"text/html": line, "text/plain": self.hint}, raw=True)

    def __repr__(self):
        return repr(self.still)


def stepper(frames, captions=None, *, still=None):
    """A slider, and buttons for one step back and forward, over a list of pictures. It counts from 1.

    The pictures travel to the browser once, so the slider answers at once, even while the kernel works.
    captions: one line per picture, by default each picture's own; still: what stays in the saved notebook, by
    default the first picture and the last.  Raises ValueError for no pictures, or a wrong number of captions.
    """
    frames = list(frames)
    captions = [frame.caption for frame in frames] if captions is None else list(captions)
    if not frames or len(captions) != len(frames):
        raise ValueError(f"stepper: {len(frames)} pictures with {len(captions)} captions")
    places = [(f"{i + 1} of {len(frames)}", i) for i in range(len(frames))]
    slider = ipywidgets.SelectionSlider(options=places, description="picture", disabled=len(frames) < 2)
    pages = [ipywidgets.HTML(_page(*pair)) for pair in zip(frames, captions, strict=True)]
    stack = getattr(ipywidgets, "Stack", ipywidgets.Tab)(pages, selected_index=0)  # ipywidgets 7 has no Stack
    ipywidgets.jslink((slider, "index"), (stack, "selected_index"))
    back, forward = (
        ipywidgets.Button(description=text, tooltip=tip, layout={"width": "3em"})
        for text, tip in (("◀", "one step back"), ("▶", "one step forward"))
    )
    back.on_click(lambda _: setattr(slider, "index", max(slider.index - 1, 0)))
    forward.on_click(lambda _: setattr(slider, "index", min(slider.index + 1, len(frames) - 1)))
    widget = ipywidgets.VBox([ipywidgets.HBox([back, slider, forward]), stack])
    return Live(widget, still or contact_sheet(frames, captions), "Run this cell to step through with a slider.")


def knobs(fn, **controls):
    """Controls for the arguments of fn(**values) -> Picture, which is drawn anew when one is let go.

    controls: as for ipywidgets.interact: (least, most), (least, most, step), a list of choices, a dict, a bool, a
    text, or a widget, whose description may say more than the argument's name.  A range starts in its middle: give
    a widget to start elsewhere.  While fn works, the picture before it is pale.  What stays in the saved notebook is
    the picture for the first values.  What fn raises later is shown in the picture's place.
    Raises ValueError for no controls, or one that cannot be made from what was given.
    """
    made = {name: _control(name, value) for name, value in controls.items()}
    if not made:
        raise ValueError("knobs: give at least one control, such as ranks=(1, 8)")
    still = fn(**{name: control.value for name, control in made.items()})
    if not isinstance(still, Picture):
        raise ValueError(f"knobs: {getattr(fn, '__name__', 'fn')} must return a picture, not {type(still).__name__}")
    page = ipywidgets.HTML(_page(still))

    def redraw(_):
        values = {name: control.value for name, control in made.items()}
        page.value = f'<em>working …</em><div style="opacity:.35">{page.value}</div>'
        try:
            page.value = _page(fn(**values))
        except Exception as error:
            page.value = f"<pre>{escape(type(error).__name__)}: {escape(str(error))}</pre>"

    for control in made.values():
        control.observe(redraw, "value")
    chosen = ", ".join(f"{control.description} = {_shown(control)}" for control in made.values())
    still = Picture(still.png, f"{still.alt} (Drawn for {chosen}.)", still.rows, still.caption)
    return Live(ipywidgets.VBox([*made.values(), page]), still, f"Drawn for {chosen}. Run this cell to change them.")


def _control(name, value):
    """A control with a name; a slider also for choices, without a redraw for every step on the way."""
    control = value if isinstance(value, ipywidgets.ValueWidget) else ipywidgets.interactive.widget_from_abbrev(value)
    if control is None:
        raise ValueError(f"knobs: no control can be made from {name}={value!r}")
    said = control.description or name.replace("_", " ")
    if isinstance(control, ipywidgets.Dropdown):
        control = ipywidgets.SelectionSlider(options=control.options, value=control.value)
    control.description = said
    control.style = WHOLE_NAMES
    if not control.layout.width:  # of the usual 300 pixels a long name would leave the slider none
        control.layout.width, control.layout.max_width = "100%", "640px"
    if control.has_trait("continuous_update"):
        control.continuous_update = False
    return control


def _shown(control):
    """A control's value as its reader sees it: of a choice, the word."""
    if not hasattr(control, "options"):
        return control.value
    options = control.options.items() if isinstance(control.options, dict) else control.options
    choice = list(options)[control.index]
    return choice[0] if isinstance(choice, tuple) and len(choice) == 2 else choice


def _page(picture, caption=""):
    """A picture as HTML, with its alt text; the caption above where the picture has it not already."""
    data, meta = picture._repr_mimebundle_()
    line = f"<div>{escape(caption)}</div>" if caption != picture.caption else ""
    return (
        f'{line}<img src="data:image/png;base64,{data["image/png"]}" width="{meta["image/png"]["width"]}" '
        f'alt="{escape(picture.alt, quote=True)}" style="max-width:100%">'
    )


def contact_sheet(frames, captions=None, most=2):
    """Up to `most` of the pictures, evenly chosen, as one `Picture`: beside each other where they fit in full size,
    else one below the other, so that what is written in them can be read. Captions: as for `stepper`."""
    frames = list(frames)
    captions = [frame.caption for frame in frames] if captions is None else list(captions)
    chosen = sorted({round(i) for i in np.linspace(0, len(frames) - 1, min(most, len(frames)))})
    images = [Image.open(BytesIO(frames[i].png)).convert("RGB") for i in chosen]
    gap, pixels, widest = 16, int(WIDTH * DPI), max(image.width for image in images)
    across = max(1, min(len(images), (pixels - gap) // (widest + gap)))
    above = 34 if any(captions[i] != frames[i].caption for i in chosen) else gap
    tall = max(image.height for image in images) + above
    size = gap + across * (widest + gap), gap + tall * -(-len(images) // across)
    page = Image.new("RGB", size, palette.PAPER)
    font, pen = ImageFont.truetype(findfont("DejaVu Sans"), 19), ImageDraw.Draw(page)
    for place, (i, image) in enumerate(zip(chosen, images, strict=True)):
        x, y = gap + place % across * (widest + gap), place // across * tall
        if captions[i] != frames[i].caption:
            pen.text((x + 4, y + 8), captions[i], fill=palette.INK, font=font)
        page.paste(image, (x, y + above))
    alt = f"{len(chosen)} of {count(len(frames), 'picture')} to step through: {'; '.join(captions[i] for i in chosen)}."
    return Picture(
        compress(page),
        f"{alt} The last one: {frames[-1].alt}",
        [
            {"picture": i + 1, "caption": c, "seen": f.alt}
            for i, (c, f) in enumerate(zip(captions, frames, strict=True))
        ],
    )

"""The page: its sections of pictures, and everything in one HTML file."""

from __future__ import annotations

import functools
import importlib.resources
import json
from collections.abc import Sequence
from html import escape

from supcon_jax import __version__
from supcon_jax.page import charts, sections
from supcon_jax.page.pictures import (
    COLUMNS,
    EmbeddingView,
    Gallery,
    Pictures,
    hardest_of,
    losses_of,
    sprite,
)
from supcon_jax.page.records import RunRecord
from supcon_jax.page.sections import Section, figure

# Classes that a legend names; with more, colours say little, and the pointer tells.
NAMED_CLASSES = 120
# What makes a section that is not there.
ABSENT = {
    "curves": "a training run with two lines of metrics or more",
    "map": "an encoder and its evaluation images",
    "neighbours": "an encoder and its evaluation images",
    "calibration": "predictions.npz of a run with mode=evaluate",
    "confusion": "predictions.npz of a run with mode=evaluate",
    "hardest": "predictions or an encoder, and the evaluation images",
    "robustness": "robustness.csv",
    "geometry": "embeddings.json",
}


def page(runs: list[RunRecord], pictures: Pictures) -> str:
    """The whole page of some runs, with everything that it needs inside."""
    found = [
        sections.summary(runs),
        sections.curves(runs),
        embedding_map(pictures),
        neighbours(pictures),
        sections.calibration(runs),
        sections.confusion(runs),
        hardest(runs, pictures),
        sections.robustness(runs),
        sections.geometry(runs),
        sections.config(runs),
    ]
    present = [section for section in found if section.content]
    absent = [section for section in found if not section.content]
    links = "".join(f'<a href="#{s.anchor}">{escape(s.title)}</a>' for s in present)
    problems = "".join(f'<p class="note">⚠ {escape(p)}</p>' for p in pictures.problems)
    body = "".join(
        f'<section id="{s.anchor}"><h2>{escape(s.title)}</h2>'
        f"{problems if s.anchor == 'summary' else ''}{s.content}</section>"
        for s in present
    )
    missing = "; ".join(f"{s.title} (needs {ABSENT[s.anchor]})" for s in absent)
    foot = f"Not shown: {missing}. " if missing else ""
    title = ", ".join(run.name for run in runs)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        # Whatever stands in names and labels: nothing is fetched.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{_asset('style.css')}"
        f"{''.join(map(_sprite_rule, range(len(pictures.galleries)), pictures.galleries))}"
        f"</style></head><body>{_SHAPES}<header><h1>{escape(title)}</h1>"
        f"<nav>{links}</nav></header><main>{body}</main>"
        f"<footer>{escape(foot)}Made by supcon_jax {escape(__version__)}.</footer>"
        f'<div id="tip" role="status" hidden></div>'
        f"<script>{_asset('script.js')}</script></body></html>\n"
    )


# The marks of maps, drawn once.
_SHAPES = (
    '<svg width="0" height="0" class="shapes" aria-hidden="true"><defs>'
    '<circle id="m0" r="3"/><rect id="m1" x="-2.6" y="-2.6" width="5.2" height="5.2"/>'
    "</defs></svg>"
)


@functools.cache
def _asset(name: str) -> str:
    return (importlib.resources.files(__package__) / name).read_text()


def _sprite_rule(number: int, gallery: Gallery) -> str:
    url, side, rows = sprite(gallery)
    smooth = "auto" if side >= 32 else "pixelated"
    return (
        f".g{number}{{background-image:url({url});image-rendering:{smooth};"
        f"--rows:{rows}}}"
    )


def tile(number: int, place: int, told: str, *, kind: str = "") -> str:
    """A thumbnail of a gallery."""
    return (
        f'<i class="tile g{number} {kind}" role="img" aria-label="{escape(told)}" '
        f'style="--x:{place % COLUMNS};--y:{place // COLUMNS}"></i>'
    )


def embedding_map(pictures: Pictures) -> Section:
    """The images of each encoder in two dimensions."""
    parts = []
    for view in pictures.views:
        gallery = pictures.galleries[view.gallery]
        labels = gallery.images.labels[view.places]
        data = {
            "gallery": view.gallery,
            "columns": COLUMNS,
            "names": gallery.names,
            "labels": labels.tolist(),
            "places": view.places.tolist(),
        }
        maps = "".join(
            figure(
                f"{method} of {len(labels):,} embeddings",
                charts.scatter(points, labels, title=f"{method}, {view.encoder}"),
            )
            for method, points in view.maps.items()
        )
        parts.append(
            f'<div class="maps" data-map="{escape(json.dumps(data))}">'
            f'{_heading(view)}{_class_keys(gallery.names)}<div class="grid">{maps}</div>'
            "</div>"
        )
    words = "<p>Embeddings of unit length. Pointing at one shows its image.</p>"
    return Section("map", "Embedding map", words + "".join(parts) if parts else "")


def _heading(view: EmbeddingView) -> str:
    return (
        f"<h3>Encoder of {escape(view.encoder)}</h3>"
        f"<p>Used by {escape(', '.join(view.runs))}.</p>"
    )


def _class_keys(names: Sequence[str]) -> str:
    """A button for each class, which shows it alone."""
    keys = "".join(
        f'<button type="button" class="key" data-class="{number}" aria-pressed="false">'
        f'<svg viewBox="-5 -5 10 10" class="mark c{number % charts.COLOURS}"><use '
        f'href="#m{number // charts.COLOURS % charts.SHAPES}"/></svg>{escape(name)}'
        "</button>"
        for number, name in enumerate(names[:NAMED_CLASSES])
    )
    more = len(names) - NAMED_CLASSES
    rest = f"<span>and {more:,} more</span>" if more > 0 else ""
    return f'<p class="legend classes">{keys}{rest}</p>'


def neighbours(pictures: Pictures) -> Section:
    """Images with those that are nearest to them."""
    parts = []
    for view in pictures.views:
        gallery = pictures.galleries[view.gallery]
        names, labels = gallery.names, gallery.images.labels
        rows = []
        for query, nearest in view.neighbours:
            found = []
            for place, cosine in nearest:
                same = labels[place] == labels[query]
                told = f"{names[labels[place]]}, cosine {cosine:.3f}"
                picture = tile(
                    view.gallery, place, told, kind="right" if same else "wrong"
                )
                found.append(
                    f'<span title="{escape(told)}">{picture}<small>'
                    f"{'✓' if same else '✗'} {cosine:.2f}</small></span>"
                )
            name = names[labels[query]]
            rows.append(
                f'<div class="row"><span class="query">{tile(view.gallery, query, name)}'
                f"<small>{escape(name)}</small></span>{''.join(found)}</div>"
            )
        parts.append(f'{_heading(view)}<div class="box rows">{"".join(rows)}</div>')
    words = (
        "<p>The first image of a class, and those with the largest cosine to it; ✗ marks "
        "another class.</p>"
    )
    title = "Nearest neighbours"
    return Section("neighbours", title, words + "".join(parts) if parts else "")


def hardest(runs: list[RunRecord], pictures: Pictures) -> Section:
    """The images with the largest loss: of classifiers, and of encoders without one."""
    parts, classified = [], set()
    for run in runs:
        number = pictures.gallery_of.get(run.name)
        if run.predictions is None or number is None:
            continue
        classified.add(run.name)
        gallery = pictures.galleries[number]
        logits, labels, ids = run.predictions
        losses, cards = losses_of(run), []
        for place in hardest_of(run):
            shown = gallery.tile(int(ids[place]))
            own, other = (
                run.class_names[c] for c in (labels[place], logits[place].argmax())
            )
            told = f"{own}, not recognised: {other}" if own != other else own
            said = f"{own} → {other}" if own != other else f"{own} ✓"
            cards.append(_card(number, shown, told, said, losses[place]))
        parts.append(
            f"<h3>{escape(run.name)}</h3><p>Class → prediction, negative log-likelihood."
            f'</p><div class="cards small">{"".join(cards)}</div>'
        )
    for view in pictures.views:
        if classified & {*view.runs}:
            continue
        gallery = pictures.galleries[view.gallery]
        cards = []
        for place, loss in view.hardest:
            name = gallery.names[gallery.images.labels[place]]
            cards.append(_card(view.gallery, place, name, name, loss))
        parts.append(
            f"{_heading(view)}<p>Contrastive loss of each embedding among those of the "
            f'map.</p><div class="cards small">{"".join(cards)}</div>'
        )
    return Section("hardest", "Hardest examples", "".join(parts))


def _card(number: int, place: int | None, told: str, said: str, loss: float) -> str:
    picture = "" if place is None else tile(number, place, told)
    return (
        f'<figure class="example">{picture}<figcaption>{escape(said)}<br>'
        f"<b>{loss:.2f}</b></figcaption></figure>"
    )

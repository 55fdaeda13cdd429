"""What the method is given to see."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ssl_pretrain.report.sections import Section
from ssl_pretrain.report.sheet import BLANK, spec_keys, tiles, views_picture, window_keys

if TYPE_CHECKING:
    from ssl_pretrain.report.folder import RunFolder

PLACE = 10
IMAGES = 4
WORDS = (
    "Source images with the crops of their views (numbers), and the views as the network is given them. Views of one "
    "image should still show the same objects; if they do not, set views.window_px or a larger scale. Where nothing is "
    "left of a view, the colour jitter is too strong for these images."
)


def section(run: RunFolder) -> Section:
    """Images of the first step with the boxes of their crops, and the views that the method was given."""
    feed = run.feed
    ids_B = feed.ids(0)[:IMAGES]
    keys = [*window_keys(feed.window_px), *spec_keys(feed.specs, feed.window_px)]
    title = f"{run.name}: where its views come from"
    figure = views_picture(feed, ids_B, tiles(feed, ids_B), [("black", title)], keys, blank=BLANK)
    count = sum(spec.count for spec in feed.specs)
    alt = f"{len(ids_B)} images with the outlines of their crops, and beside each its {count} augmented views"
    return Section("What the method sees", WORDS, figure, alt)

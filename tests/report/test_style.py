"""The style of all figures."""

from __future__ import annotations

from autosparse.report import style


def test_places_of_texts_are_known_before_a_figure_is_saved() -> None:
    with style.panels() as (figure, axes):
        text = axes[0, 0].text(0.5, 0.5, "AutoS")
        before = text.get_window_extent().x0
        axes[0, 0].set_ylabel("a label that takes the axes some width")
        figure.canvas.draw()
        assert text.get_window_extent().x0 != before

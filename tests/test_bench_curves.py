"""Pictures and text about the objectives agree with the closed forms, and the pictures can be read."""

from __future__ import annotations

import html
import itertools
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

import hpo_fused as hf
from hpo_fused import reference

pytest.importorskip("rich")
typer = pytest.importorskip("typer")
testing = pytest.importorskip("typer.testing")

from hpo_fused.bench import curves_figures  # noqa: E402
from hpo_fused.bench import curves_pages as pages  # noqa: E402
from hpo_fused.bench.curves import curves  # noqa: E402

ROOT = Path(__file__).parent.parent
PICTURES = ROOT / "docs" / "curves"
TEXT = (ROOT / "docs" / "objectives.md").read_text(encoding="utf-8")
SVG = "{http://www.w3.org/2000/svg}"
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")
Invoke = Callable[..., Any]


@pytest.fixture
def invoke() -> Invoke:
    """Runs the command as ``hpo-fused-bench curves`` does."""
    app = typer.Typer()
    app.command()(curves)
    return lambda *arguments: testing.CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def matplotlib() -> Any:
    """matplotlib, or a skip."""
    return pytest.importorskip("matplotlib", reason="needs the bench extra")


# ---------------------------------------------------------------------------------------------------------------
# what is drawn


def test_values_match_the_independent_table() -> None:
    """Surrogates and derivatives as tests/make_objectives.py computed them without this package."""
    objectives = {name: hf.Objective.preset(name) for name in ("grpo", "dapo", "sapo", "mhpo")}
    rows = json.loads((Path(__file__).parent / "objectives.json").read_text(encoding="utf-8"))["rows"]
    compared = 0
    for row in rows:
        if row["objective"] in objectives and row["advantage"] != 0:
            x = torch.tensor([row["log_ratio"]], dtype=torch.float64)
            values = pages.evaluate(objectives[row["objective"]], x, row["advantage"])
            assert float(values.surrogate) == pytest.approx(-row["loss"], rel=1e-9, abs=1e-12)
            expected = -row["dloss_dlogp"] / row["advantage"]
            assert float(values.multiplier) == pytest.approx(expected, rel=1e-9, abs=1e-12)
            compared += 1
    assert compared > 200


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("name", ["GRPO", "DAPO", "GSPO", "DELTA", "DUAL", "MHPO", "NO_HAZARD", "SAPO", "CISPO", "HPO"])
def test_values_match_autograd_of_the_oracle(name: str, sign: float) -> None:
    """The public formula, differentiated, at ratios away from every bound."""
    objective = getattr(pages, name)
    alpha = pages.alpha_of(objective, 1, 1)
    for ratio in (0.45, 0.79, 0.999, 1.00001, 1.19, 1.25, 2.9, 3.9, 6.0):
        logp = torch.full((1, 1), pages.OLD_LOGPROB + math.log(ratio), dtype=torch.float64, requires_grad=True)
        old = torch.full((1, 1), pages.OLD_LOGPROB, dtype=torch.float64)
        advantage = torch.tensor([sign], dtype=torch.float64)
        loss = reference.logprob_policy_loss(logp, advantage, old_logprobs=old, objective=objective)
        (gradient,) = torch.autograd.grad(loss, logp)
        surrogate, multiplier = pages.at_ratio(objective, ratio, sign, alpha)
        assert surrogate == pytest.approx(-loss.item(), rel=1e-9)
        assert multiplier == pytest.approx(-gradient.item() / sign, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("name", hf.Objective.presets())
def test_on_policy_rows_match_the_public_loss(name: str) -> None:
    """The overview's dots are a positive token's gradient; its bars end at the extremes of a negative one's."""
    bars = {curve.name: curve for curve in pages.overview().panels[-1].curves}
    low, high = bars[f"{name}, A < 0"].x
    (positive,) = bars[f"{name}, A > 0"].x
    objective = hf.Objective.preset(name)
    if objective.normalization == "constant":
        objective = hf.Objective.preset(name, max_length=1)
    for counts, sign, expected in (((1, 0), 1.0, positive), ((0, 1), -1.0, low), ((1, 1), -1.0, high)):
        logprobs = torch.full((1, 1), -1.0, requires_grad=True)
        statistics = hf.BatchStatistics(1, 1, *counts)
        out = hf.logprob_policy_loss(logprobs, torch.tensor([sign]), objective=objective, statistics=statistics)
        out.loss.backward()
        assert logprobs.grad is not None
        assert -logprobs.grad.item() / sign == pytest.approx(expected, rel=1e-6)


def test_every_preset_has_its_row() -> None:
    names = [text for _, text in reversed(pages.overview().panels[-1].y_ticks)]
    assert names == list(hf.Objective.presets())


@pytest.mark.parametrize("name", pages.PAGES)
def test_curves_stay_inside_their_panels(name: str) -> None:
    """What leaves a panel is cut off, and a reader takes the rest for everything."""
    for panel in pages.PAGES[name]().panels:
        for curve in panel.curves:
            for x, y in zip(curve.x, curve.y, strict=True):
                assert panel.x_range[0] - 1e-9 <= x <= panel.x_range[1] + 1e-9, curve.name
                assert panel.y_range[0] <= y <= panel.y_range[1], curve.name


def test_jumps_are_sampled_from_both_sides() -> None:
    """Between two points of an even grid a jump would be drawn as a slope."""
    clip = pages.clip().panels[2]
    (dapo,) = (curve for curve in clip.curves if curve.name == "dapo")
    widest = max(
        x1 - x0 for (x0, y0), (x1, y1) in itertools.pairwise(zip(dapo.x, dapo.y, strict=True)) if abs(y1 - y0) > 0.5
    )
    assert widest < 1e-5


# ---------------------------------------------------------------------------------------------------------------
# committed pictures


def committed(name: str) -> ElementTree.Element:
    """The committed picture's tree."""
    return ElementTree.parse(PICTURES / f"{name}.svg").getroot()


def drawn_points(group: ElementTree.Element) -> list[tuple[float, float]]:
    """The vertices of a curve in a picture: of its line, or where its markers are."""
    markers = [(float(use.attrib["x"]), float(use.attrib["y"])) for use in group.iter(f"{SVG}use")]
    if markers:
        return markers
    (path,) = group.findall(f"{SVG}path")
    numbers = [float(number) for number in NUMBER.findall(path.attrib["d"])]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


@pytest.mark.parametrize("name", pages.PAGES)
def test_committed_pictures_show_the_closed_forms(name: str) -> None:
    """Every vertex of every curve lies where the closed form puts it, whichever matplotlib drew it. Needs none.

    Run ``hpo-fused-bench curves --output docs/curves`` after a change to an objective.
    """
    page, root = pages.PAGES[name](), committed(name)
    groups = {element.attrib.get("id"): element for element in root.iter(f"{SVG}g")}
    expected_ids = set()
    for index, panel in enumerate(page.panels):
        for number, curve in enumerate(panel.curves):
            expected_ids.add(f"curve-{index}-{number}")
            drawn = drawn_points(groups[f"curve-{index}-{number}"])
            expected = [panel.place(x, y) for x, y in zip(curve.x, curve.y, strict=True)]
            assert len(drawn) == len(expected), curve.name
            for (x, y), (to_x, to_y) in zip(drawn, expected, strict=True):
                assert (x, page.height - y) == pytest.approx((to_x, to_y), abs=0.02), curve.name
    assert {name for name in groups if name and name.startswith("curve-")} == expected_ids


@pytest.mark.parametrize("name", pages.PAGES)
def test_committed_pictures_hold_every_text(name: str) -> None:
    """Texts are outlines; matplotlib notes each in a comment."""
    source = (PICTURES / f"{name}.svg").read_text(encoding="utf-8")
    comments = set(map(html.unescape, re.findall(r"<!-- (.*?) -->", source, flags=re.DOTALL)))
    for panel in pages.PAGES[name]().panels:
        labels = [label.text for curve in panel.curves for label in curve.labels]
        ticks = [text for _, text in (*panel.x_ticks, *panel.y_ticks)]
        for text in (panel.title, panel.x_label, *labels, *ticks):
            assert set(text.splitlines()) <= comments


def test_no_other_pictures_are_committed() -> None:
    assert {path.name for path in PICTURES.iterdir()} == {f"{name}.svg" for name in pages.PAGES}


@pytest.mark.parametrize("name", pages.PAGES)
def test_committed_pictures_are_what_the_command_draws(name: str, matplotlib: Any) -> None:
    """Byte by byte, where the same matplotlib drew them."""
    source = (PICTURES / f"{name}.svg").read_text(encoding="utf-8")
    found = re.search(r"Matplotlib v([^,]+),", source)
    assert found
    if found[1] != matplotlib.__version__:
        pytest.skip(f"drawn by matplotlib {found[1]}, here is {matplotlib.__version__}")
    with curves_figures.settings():
        assert curves_figures.svg(pages.PAGES[name]()) == source


# ---------------------------------------------------------------------------------------------------------------
# legibility


def ink(text: Any, renderer: Any) -> Any:
    """A text's box, without the white patch behind it and less the pixel that fonts' versions may differ by."""
    from matplotlib.text import Text

    if hasattr(text, "update_positions"):
        text.update_positions(renderer)
    return Text.get_window_extent(text, renderer).padded(-1)


@pytest.mark.parametrize("name", pages.PAGES)
def test_texts_overlap_nothing(name: str, matplotlib: Any) -> None:
    """No text leaves the page, lies on another or on a curve."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with curves_figures.settings():
        figure = curves_figures.draw(pages.PAGES[name]())
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        boxes = []
        for axes in figure.axes:
            texts = [*axes.texts, *axes.get_xticklabels(), *axes.get_yticklabels(), axes._left_title, axes.xaxis.label]
            here = [(text.get_text(), ink(text, canvas.get_renderer())) for text in texts if text.get_text()]
            assert len(here) > 5
            for curve in (line for line in axes.get_lines() if (line.get_gid() or "").startswith("curve-")):
                path = curve.get_transform().transform_path(curve.get_path())
                for text, box in here:
                    assert not path.intersects_bbox(box, filled=False), f"{curve.get_gid()} runs through {text!r}"
            boxes += here
    width, height = canvas.get_width_height()
    for text, box in boxes:
        assert box.x0 >= 0, text
        assert box.y0 >= 0, text
        assert box.x1 <= width, text
        assert box.y1 <= height, text
    for (one, first), (two, second) in itertools.combinations(boxes, 2):
        assert not first.overlaps(second), f"{one!r} lies on {two!r}"


def luminance(colour: str) -> float:
    """WCAG 2's relative luminance of #rrggbb."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_labels_have_contrast() -> None:
    """Labels have their curves' colours: at least 4.5 to 1 on white, WCAG's limit for text of this size."""
    for page in pages.PAGES.values():
        for colour in {curve.colour for panel in page().panels for curve in panel.curves}:
            assert 1.05 / (luminance(colour) + 0.05) >= 4.5, colour


# ---------------------------------------------------------------------------------------------------------------
# the command


def test_command_writes_what_was_asked_for(invoke: Invoke, tmp_path: Path, matplotlib: Any) -> None:
    folder = tmp_path / "new" / "folder"
    found = invoke("--output", folder, "--family", "soft_gate", "--family", "weighting", "--family", "soft_gate")
    assert found.exit_code == 0, found.output
    assert {path.name for path in folder.iterdir()} == {"soft_gate.svg", "weighting.svg"}
    assert found.output.count("Wrote") == 2


def test_command_draws_every_family_by_default(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, matplotlib: Any
) -> None:
    monkeypatch.setattr("hpo_fused.bench.curves.write", lambda page, folder, format: folder / page.name)
    found = invoke("--output", tmp_path)
    assert found.exit_code == 0, found.output
    assert re.findall(r"(\w+)$", found.output, flags=re.MULTILINE) == list(pages.PAGES)


def test_png(invoke: Invoke, tmp_path: Path, matplotlib: Any) -> None:
    found = invoke("--output", tmp_path, "--family", "soft_gate", "--format", "png")
    assert found.exit_code == 0, found.output
    data = (tmp_path / "soft_gate.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n")
    assert int.from_bytes(data[16:20], "big") == 1600


def test_users_settings_change_nothing(tmp_path: Path, matplotlib: Any) -> None:
    """Two runs give the same bytes, and so does one under a matplotlibrc that enlarges everything."""
    page = pages.soft_gate()
    for format in curves_figures.FORMATS:
        first = curves_figures.write(page, tmp_path, format).read_bytes()
        with matplotlib.rc_context({"font.size": 30, "lines.linewidth": 9, "svg.fonttype": "none", "axes.grid": True}):
            assert curves_figures.write(page, tmp_path, format).read_bytes() == first
            assert matplotlib.rcParams["font.size"] == 30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--family", "ppo"), "unknown family 'ppo'; expected one of overview, clip,"),
        (("--format", "pdf"), "unknown format 'pdf'; expected svg or png"),
    ],
)
def test_command_refuses(invoke: Invoke, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    found = invoke("--output", tmp_path / "out", *arguments)
    assert found.exit_code == 2
    assert message in re.sub(r"[\s│]+", " ", found.output)
    assert not (tmp_path / "out").exists()


def test_command_refuses_a_file_as_folder(invoke: Invoke, tmp_path: Path, matplotlib: Any) -> None:
    (tmp_path / "file").touch()
    found = invoke("--output", tmp_path / "file")
    assert found.exit_code == 2
    assert "cannot write into" in found.output


def test_command_names_what_is_missing(invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    found = invoke("--output", tmp_path / "out")
    assert found.exit_code == 2
    assert "needs matplotlib: pip install 'hpo-fused[bench]'" in found.output
    assert not (tmp_path / "out").exists()


def test_matplotlib_is_loaded_only_to_draw() -> None:
    """The other commands start without it."""
    code = (
        "import sys, hpo_fused.bench.curves as c, hpo_fused.bench.curves_pages as p; p.clip(); "
        "sys.exit('matplotlib' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---------------------------------------------------------------------------------------------------------------
# docs/objectives.md


def sections() -> dict[str, str]:
    """The page's sections by heading, each on one line."""
    parts = re.split(r"^## (.+)$", TEXT, flags=re.MULTILINE)
    return {name: re.sub(r"\s+", " ", body) for name, body in zip(parts[1::2], parts[2::2], strict=True)}


def multiplier(objective: hf.Objective, ratio: float, sign: float = 1.0) -> float:
    return pages.at_ratio(objective, ratio, sign)[1]


def claims() -> dict[str, list[tuple[str, tuple[float, ...]]]]:
    """By section: phrases of the text with a group for each number, and what the closed forms give for it."""
    grpo, dapo, gspo, mhpo, sapo = pages.GRPO, pages.DAPO, pages.GSPO, pages.MHPO, pages.SAPO
    bounds = grpo.lower().parameters
    on_policy, (r, top), (bare_r, bare_top) = multiplier(mhpo, 1.0), pages.peak(mhpo), pages.peak(pages.NO_HAZARD)
    (sapo_r, sapo_top), (down_r, down_top) = pages.peak(sapo), pages.peak(sapo, -1.0)
    hpo, least, most = pages.alpha_range(pages.HPO)[0], *pages.alpha_range(pages.AHPO)
    assert multiplier(pages.CISPO, 5.5) == multiplier(pages.CISPO, 7.0)
    return {
        "All presets": [
            (r"scales everything by (\S+),", (on_policy,)),
            (r"negative advantages by (\S+), `ahpo` by something between (\S+) and (\d+);", (hpo, least, most)),
            (r"between (\S+) and (\S+)\. A factor", (least * on_policy, most * on_policy)),
            (r"multiplies by (\S+) at most", (top,)),
        ],
        "Clip": [
            (r"which is (\S+) for `grpo` and (\S+) for `dapo`", (bounds[1], dapo.lower().parameters[1])),
            (r"1 − low, which is (\S+) for both", (bounds[0],)),
            (r"beyond (\d+) and (\d+)\.", (pages.DELTA.lower().parameters[2], pages.DUAL.lower().parameters[3])),
            (r"clips to (\S+) and (\S+):", gspo.lower().parameters[:2]),
        ],
        "LogFidelity": [
            (r"ζ = (\S+) at r = 1,", (pages.on_policy_hazard(),)),
            (r"carries (\S+) of GRPO's", (on_policy,)),
            (r"learning rate (\S+) times lower", (1 / on_policy,)),
            (r"KL and entropy terms (\S+) times heavier", (1 / on_policy,)),
            (r"The multiplier peaks at (\S+), at r = (\S+), which is (\S+) times", (top, r, top / on_policy)),
            (r"falls to (\S+) at r = 5", (multiplier(mhpo, 5.0),)),
            (r"falls faster: (\S+) at r = (\S+)\.", (multiplier(mhpo, 0.5), 0.5)),
            (
                r"alone: (\d) at r = 1, a peak of (\S+) at r = (\S+)\.",
                (multiplier(pages.NO_HAZARD, 1), bare_top, bare_r),
            ),
        ],
        "SoftGate": [
            (
                r"there, (\d) for A = 1 and −(\S+) for A = −1",
                (pages.at_ratio(sapo, 1.0)[0], -pages.at_ratio(sapo, 1.0, -1.0)[0]),
            ),
            (
                r"to (\S+) at r = (\S+) \(for A < 0 to (\S+) at r = (\S+)\)",
                (sapo_top, sapo_r, down_top, down_r),
            ),
            (r"down to (\S+) at r = 5 and (\S+) at r = 8\.", (multiplier(sapo, 5.0), multiplier(sapo, 8.0))),
            (r"close to r: (\S+) at r = (\S+)\.", (multiplier(sapo, 0.5), 0.5)),
        ],
        "TruncatedRatio": [
            (r"up to high, (\d) for `cispo`", (multiplier(pages.CISPO, 6.0),)),
            (r"by (\S+) in the picture\.", (multiplier(pages.BOUNDED_BELOW, 0.5),)),
            (r"log p_old = −(\S+)\)", (-pages.OLD_LOGPROB,)),
        ],
        "Hysteretic and adaptive weighting": [
            (r"negative advantages by (\S+), always", (hpo,)),
            (r"balance: (\S+) where one response in four", (pages.alpha_of(pages.AHPO, 1, 3),)),
            (r"Below N⁺/N⁻ = (\S+) the least", (least,)),
            (r"still learns, at (\S+) of the gradient", (pages.alpha_of(pages.AHPO, 0, 8),)),
        ],
    }


@pytest.mark.parametrize("name", claims())
def test_numbers_in_the_text(name: str) -> None:
    """Each is the closed forms' number to the digits it is written with, and exactly if those are fewer than two.

    No fraction stands there unexamined.
    """
    text = sections()[name]
    examined = set()
    for pattern, values in claims()[name]:
        matches = list(re.finditer(pattern, text))
        assert len(matches) == 1, pattern
        assert len(matches[0].groups()) == len(values), pattern
        for group, value in enumerate(values, start=1):
            written = matches[0][group]
            digits = len(written.partition(".")[2])
            assert written == f"{value:.{digits}f}", pattern
            assert digits >= 2 or float(written) == pytest.approx(value, rel=1e-9), pattern
            examined.add(matches[0].start(group))
    fractions = {match.start() for match in re.finditer(r"\d+\.\d+", text)}
    assert fractions <= examined, [text[at : at + 12] for at in sorted(fractions - examined)]


def test_every_section_is_examined_and_has_its_picture() -> None:
    assert set(sections()) == set(claims())
    shown = [found for body in sections().values() for found in re.findall(r"\]\(curves/(\w+)\.svg\)", body)]
    assert shown == list(pages.PAGES)


def test_qualitative_statements_in_the_text() -> None:
    """What the text says without numbers."""
    x = torch.linspace(-19.9, 19.9, 1001, dtype=torch.float64)
    positive = pages.evaluate(pages.MHPO, x, 1.0).multiplier
    assert bool((positive > 0).all())  # "not 0 within the clamp"
    torch.testing.assert_close(positive, pages.evaluate(pages.MHPO, x, -1.0).multiplier)  # "the same for both signs"
    for objective in (pages.DELTA, pages.DUAL):
        assert multiplier(objective, 4.1, -1.0) == 0
    assert multiplier(pages.GRPO, 8.0, -1.0) == pytest.approx(8.0)  # "eight times the gradient"
    assert multiplier(pages.GRPO, 0.01) == pytest.approx(0.01)  # "no lower bound"
    assert multiplier(pages.GSPO, 1.0003) == pytest.approx(1.0, abs=1e-3)
    for name in ("grpo", "dapo", "gspo"):  # "at r = 1 no bound acts"
        assert multiplier(hf.Objective.preset(name), 1.0) == multiplier(hf.Objective.preset(name), 1.0, -1.0) == 1
    for positives, negatives in ((1, 9), (3, 5), (7, 8)):  # "α·N⁻ = N⁺"
        assert pages.alpha_of(pages.AHPO, positives, negatives) * negatives == pytest.approx(positives)

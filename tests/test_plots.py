import numpy as np
import pytest
from evaluation_runs import read_results, sounds_of

from training.evaluation.items import System
from training.evaluation.measuring import Figure
from training.evaluation.plots import draw_plots
from training.evaluation.report import Tables


pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def test_a_sweep_makes_every_combination_and_plots_it(measure, short_folder, recordings):
    flags = ("--model", short_folder, "--prompts", recordings, "--num_prompts=2", "--num_inference_steps=1,2")
    out = measure(*flags, "--guidance_scale=1,3", "--scheduler=own,dpm++")
    rows = [row for row in read_results(out) if row["metric"] == "frechet" and row["scheduler"]]
    combinations = {(row["scheduler"], row["num_inference_steps"], row["guidance_scale"]) for row in rows}
    assert len(rows) == len(combinations) == 8 and ("dpm++", "2", "1.0") in combinations
    assert all(float(row["seconds_per_clip"]) > 0 for row in rows)
    assert len({row["value"] for row in rows}) == 8
    assert len(sounds_of(out)) == 16
    picture = (out / "frechet_yamnet.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and "(frechet_yamnet.png)" in (out / "results.md").read_text()


def test_only_what_varies_is_plotted(tmp_path):
    tables = Tables(confidence=0.95)
    for steps, value in ((10, 3.0), (20, 2.0)):
        figures = {"kernel": Figure(value, np.linspace(0, 4, 20), 7)}
        tables.add("results", System(f"a-{steps}", "a", "own", steps, 3.0), "", "yamnet", figures)
    assert draw_plots(tables, "clap", None, tmp_path) == []
    assert [path.name for path in draw_plots(tables, "yamnet", None, tmp_path)] == ["kernel_yamnet.png"]
    tables.rows["results"].pop()
    assert draw_plots(tables, "yamnet", None, tmp_path) == []
    for count in ("1", "2"):
        tables.add("candidates", System("a-10", "a"), count, "yamnet", {"recall": Figure(0.5, np.ones(20), 7)})
    assert [path.name for path in draw_plots(tables, "yamnet", "clap", tmp_path)] == ["recall_yamnet.png"]

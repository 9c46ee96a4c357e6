"""The notebook runs from top to bottom, with tango-tiny and without a network."""

import re
from pathlib import Path

import nbclient
import nbformat


EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_quickstart_runs_and_its_lora_brings_the_sound_nearer_to_the_recording(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # other tests run beside it
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # none is committed: sounds are large
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(EXAMPLES)}})
    client.execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    data = [output["data"] for output in outputs if output.output_type == "display_data"]
    assert (
        sum("<audio" in each.get("text/html", "") for each in data) == sum("image/png" in each for each in data) == 7
    )
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    before, half, whole = map(float, re.findall(r"recording (\d+\.\d+) nepers", printed))
    assert whole < before and half < before

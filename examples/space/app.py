"""A Hugging Face Space: the page of `tango-demo`, with the model, LoRA and limits of the Space's variables."""

import os

from pipeline_tango.demo import main


VARIABLES = {
    "TANGO_MODEL": "--model",
    "TANGO_LORA": "--lora",
    "TANGO_MAX_SECONDS": "--max_seconds",
    "TANGO_QUEUE": "--queue",
    "GRADIO_SERVER_PORT": "--port",
}


if __name__ == "__main__":
    flags = [f"{flag}={os.environ[name]}" for name, flag in VARIABLES.items() if os.environ.get(name)]
    raise SystemExit(main(["--host", os.environ.get("GRADIO_SERVER_NAME", "0.0.0.0"), *flags]))

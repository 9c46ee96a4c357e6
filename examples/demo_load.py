"""Load test of `tango-demo`: several clients at once, each of which must get its own sounds, and the server's memory.

    python -m examples.demo_load

Starts a server, lets one client make each sound once, then all clients ask for them again and again, and compares
every WAV file with the first one of the same prompt and seed. Needs the extra `demo`.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
from gradio_client import Client


PROMPTS = ["rain", "a cow moos", "birds sing", "thunder", "footsteps", "a bell rings", "a train passes", "drums"]
SEEDS = (0, 1)


def start_server(folder):
    command = [sys.executable, "-m", "pipeline_tango.demo", "--port", "0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=folder)
    for line in server.stderr:
        if match := re.match(r"http://\S+", line):
            threading.Thread(target=server.stderr.read, daemon=True).start()
            return server, match[0]
    raise SystemExit(f"the server ended with status {server.wait()}")


def make(client, prompt, seed, args):
    options = {"seconds": args.seconds, "steps": args.steps, "seed": seed}
    files, [details] = client.predict(prompt, **options, api_name="/text_to_audio")
    return Path(files[0]).read_bytes(), (details["prompt"], details["seed"])


def load(url, process, args):
    """How many sounds were right, lost, and mixed up with another client's or settings."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"verbose": False, "download_files": folder, "httpx_kwargs": {"timeout": 60}}
        clients = [Client(url, **options) for _ in range(args.clients)]
        prompts = [PROMPTS[i % len(PROMPTS)] + "!" * (i // len(PROMPTS)) for i in range(args.clients)]
        expected = {(prompt, seed): make(clients[0], prompt, seed, args)[0] for prompt in prompts for seed in SEEDS}
        memory = psutil.Process(process).memory_info
        print(f"requests     MB   (resident memory of the server)\n{0:8} {memory().rss / 1e6:6.0f}", flush=True)
        lock, counts, asked = threading.Lock(), {"done": 0, "lost": 0, "mixed up": 0}, iter(range(args.requests))

        def work(client, prompt):
            while True:
                with lock:
                    number = next(asked, None)
                if number is None:
                    return
                seed = SEEDS[number % len(SEEDS)]
                try:
                    is_right = make(client, prompt, seed, args) == (expected[prompt, seed], (prompt, seed))
                    outcome = "done" if is_right else "mixed up"
                except Exception as error:  # counted, and the other clients go on
                    print(error)
                    outcome = "lost"
                with lock:
                    counts[outcome] += 1
                    if (total := sum(counts.values())) % 25 == 0:
                        print(f"{total:8} {memory().rss / 1e6:6.0f}", flush=True)

        start = time.perf_counter()
        threads = [threading.Thread(target=work, args=each) for each in zip(clients, prompts)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    print(f"{counts}, {sum(counts.values()) / (time.perf_counter() - start):.2f} requests a second")
    return counts


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=200, help="of all clients together")
    parser.add_argument("--steps", type=int, default=2, help="denoising steps of each sound")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of each sound")
    args = parser.parse_args(argv)

    server, url = start_server(Path.cwd())
    try:
        counts = load(url, server.pid, args)
    finally:
        server.terminate()
        server.wait()
    return 0 if counts["done"] == args.requests else 1


if __name__ == "__main__":
    raise SystemExit(main())

"""Loading and merging large files: `python examples/benchmarks/files.py --gigabytes 4`.

Makes a random transformer in the published layout, and a LoRA for it, then measures in processes of their own:
loading in 8 bits (peak memory above what is kept) and `kontext merge` (peak memory, and speed against a plain copy).
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from kontext.files import save_tensors
from kontext.lora.adapter import attach
from kontext.lora.files import save_lora
from kontext.model.transformer import Transformer, TransformerConfig

WIDTH, RANK = 1536, 16
BLOCK_BYTES = 2 * 15 * WIDTH * WIDTH  # a single block in bfloat16: 12 D^2 for tokens, 3 D^2 for modulation

# Peak memory of a process is read from the system (VmHWM), less what it maps of the file (RssFile).
LOAD = """
import json, sys, torch
from pathlib import Path
from kontext.checkpoints import load_transformer

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])

from threading import Event, Thread
done, peak = Event(), [0]
def watch():
    while not done.wait(0.005):
        peak[0] = max(peak[0], anonymous())
before = anonymous()
thread = Thread(target=watch); thread.start()
model = load_transformer(sys.argv[1], device="cpu", dtype=torch.bfloat16, quantization="fp8_scaled")
done.set(); thread.join()
kept = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
print(json.dumps({"kept": kept, "over": peak[0] - before - kept}))
"""
MERGE = """
import json, resource, sys
from kontext.cli import main
code = main(sys.argv[1:])
print(json.dumps({"peak": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}))
sys.exit(code)
"""


def write(folder: Path, gigabytes: float) -> tuple[Path, Path]:
    """A bfloat16 checkpoint of about that size, and a LoRA for all its blocks."""
    blocks = max(2, round(gigabytes * 1e9 / BLOCK_BYTES))
    config = TransformerConfig(
        64, 64, 512, 256, WIDTH, WIDTH // 128, 4 * WIDTH, 1, blocks, (16, 56, 56), 10_000.0, True
    )
    with torch.device("meta"):
        model = Transformer(config)
    torch.manual_seed(0)
    tensors = {name: torch.randn(t.shape, dtype=torch.bfloat16) for name, t in model.state_dict().items()}
    save_tensors(folder / "dit.safetensors", tensors, {})
    del tensors
    modules = attach(model.to_empty(device="cpu").to(torch.bfloat16), rank=RANK, alpha=RANK, seed=0)
    for module in modules.values():
        torch.nn.init.normal_(module.lora_up.weight, std=1e-3)
    save_lora(folder / "lora.safetensors", modules, dtype=torch.float32, metadata={})
    return folder / "dit.safetensors", folder / "lora.safetensors"


def child(code: str, *arguments: object) -> dict[str, int]:
    """Run `code` in a process of its own; what it prints last."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])


def timed_copy(source: Path, target: Path) -> float:
    start = time.perf_counter()
    shutil.copyfile(source, target)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--folder", type=Path, help="where to write (twice the size is needed)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        dit, lora = write(folder, options.gigabytes)
        size = dit.stat().st_size / 1e9
        loaded = child(LOAD, dit)
        kept, over = loaded["kept"] / 1e9, loaded["over"] / 1e9
        print(f"| load {size:.1f} GB as fp8_scaled | keeps {kept:.2f} GB | {over:.2f} GB over at the peak |")
        copying = timed_copy(dit, folder / "copy.safetensors")
        (folder / "copy.safetensors").unlink()
        start = time.perf_counter()
        merge = ("merge", "--dit", dit, "--lora-weight", lora, "--output", folder / "merged.safetensors")
        merged = child(MERGE, *merge, "--device", "cpu")
        seconds = time.perf_counter() - start
        peak = merged["peak"] / 1e9
        print(
            f"| merge rank {RANK} into {size:.1f} GB | peak {peak:.2f} GB | {seconds:.1f} s, copying {copying:.1f} s |"
        )


if __name__ == "__main__":
    main()

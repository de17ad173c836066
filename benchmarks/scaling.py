"""Plans Mistral 7B on common slices and on 1 to 256 devices, for the tables of docs/scaling.md.

Runs `python -m mistral_jax.plan` for each case, which takes an hour in all. Cases that are already
in the file of results are skipped. It needs libtpu, and matplotlib for the plot.

    python benchmarks/scaling.py runs/scaling.jsonl
    python benchmarks/scaling.py runs/scaling.jsonl --draw docs/scaling.png
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

MODEL = "mistral-7b-v0.3"
SERVING = [  # chip, devices, layout, mesh, rows, tokens of a row
    ("v5e", 4, "tensor", "tensor=4", 32, 4096),
    ("v5e", 4, "tensor", "tensor=4", 8, 32768),
    ("v5e", 8, "tensor", "tensor=8", 8, 32768),
    ("v5e", 8, "tensor", "tensor=8", 64, 4096),
    ("v5e", 16, "data_tensor", "data=2,tensor=8", 128, 4096),
    ("v6e", 1, None, None, 8, 4096),
    ("v6e", 4, "tensor", "tensor=4", 32, 8192),
    ("v5p", 4, "tensor", "tensor=4", 32, 32768),
    ("L4", 1, None, None, 4, 4096),
    ("A100", 1, None, None, 32, 8192),
    ("H100", 1, None, None, 32, 8192),
    ("H200", 1, None, None, 32, 16384),
]
TRAINING = [
    ("v5e", 64, "fsdp", None, 64, 2048),
    ("v5p", 16, "fsdp", None, 16, 4096),
    ("v5p", 64, "fsdp", None, 64, 4096),
    ("v5p", 8, "long", None, 1, 32768),
]
COUNTS = (1, 4, 8, 16, 32, 64, 128, 256)
# 8 rows for any number of devices: tensor parallel up to 8 devices, then replicas for up to 8 rows,
# and then tensor parallel again.
STRONG = [
    (
        "v6e",
        n,
        "data_tensor",
        f"data={min(8, n // min(n, 8))},tensor={n // min(8, n // min(n, 8))}",
        8,
        4096,
    )
    for n in COUNTS
]
# 8 rows per device, tensor parallel up to 8 devices.
WEAK = [
    ("v6e", n, "data_tensor", f"data={n // min(n, 8)},tensor={min(n, 8)}", 8 * n, 4096)
    for n in COUNTS
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", type=Path, help="JSONL file to create or continue")
    parser.add_argument("--draw", type=Path, metavar="PNG", help="print the tables, save the plot")
    arguments = parser.parse_args()
    if arguments.draw:
        draw(arguments.results, arguments.draw)
        return
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    done = {json.loads(line)["case"] for line in read(arguments.results)}
    cases = [(case, False) for case in SERVING + STRONG + WEAK] + [(c, True) for c in TRAINING]
    for case, train in cases:
        name = name_of(case, train)
        if name in done:
            continue
        done.add(name)
        print(name, flush=True)
        for line in plan(case, train):
            with arguments.results.open("a") as file:
                file.write(json.dumps({"case": name} | json.loads(line)) + "\n")


def plan(case: tuple, train: bool) -> list[str]:
    """Runs the planner for a case; returns its lines of output."""
    chip, devices, layout, mesh, rows, length = case
    command = [sys.executable, "-m", "mistral_jax.plan", MODEL, "--json", "--hardware", chip]
    command += ["--devices", str(devices), "--batch", str(rows), "--length", str(length)]
    command += ["--sharding", layout] if layout else []
    command += ["--mesh", mesh] if mesh else []
    command += ["--train"] if train else []
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return run.stdout.splitlines()


def name_of(case: tuple, train: bool) -> str:
    chip, devices, layout, mesh, rows, length = case
    kind = "train" if train else "generate"
    return f"{kind} {chip} x{devices} {layout} {mesh} {rows}x{length}"


def read(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []


def draw(results: Path, target: Path) -> None:
    """Prints the tables in Markdown, and plots strong and weak scaling."""
    found = {}
    for line in map(json.loads, read(results)):
        found.setdefault(line["case"], {})[line["program"]] = line

    print("| chips | layout | rows x tokens | weights | cache | temporaries | fits "
          "| prompt: at best, by the compiler | decode: at best, by the compiler "
          "| binds |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|")
    for case in SERVING:
        both = found[name_of(case, False)]
        prefill, decode = both["prefill"], both["decode"]
        refused = prefill["refusal"] or decode["refusal"]
        temporaries = max(prefill["temporary_bytes"] or 0, decode["temporary_bytes"] or 0)
        cells = [
            *about(case),
            gigabytes(prefill["weights_bytes"]),
            gigabytes(prefill["cache_bytes"]),
            "refused" if refused else gigabytes(temporaries) + mark(prefill),
            verdict(prefill, decode),
            rates(prefill),
            rates(decode),
            f"{prefill['binds']}, {decode['binds']}",
        ]
        print("| " + " | ".join(cells) + " |")
    print()
    print("| chips | layout | rows x tokens | weights, optimizer | temporaries | fits "
          "| tokens/s: at best, by the compiler | MFU | sent: arithmetic, compiled |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|")
    for case in TRAINING:
        step = found[name_of(case, True)]["train"]
        cells = [
            *about(case),
            gigabytes(step["weights_bytes"] + step["optimizer_bytes"]),
            "refused" if step["refusal"] else gigabytes(step["temporary_bytes"]),
            verdict(step),
            rates(step),
            f"{step['mfu']:.0%}",
            f"{gigabytes(step['model_sent_bytes'])}, {gigabytes(step['compiled_sent_bytes'])}",
        ]
        print("| " + " | ".join(cells) + " |")
    print()
    print("| chips | mesh | rows | step | memory | exchange | sent: arithmetic, compiled "
          "| tokens/s: at best, by the compiler |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|")
    for case in dict.fromkeys(STRONG + WEAK):
        decode = found[name_of(case, False)]["decode"]
        cells = [
            str(case[1]),
            case[3].replace(",", ", "),
            str(case[4]),
            f"{decode['seconds'] * 1e3:.2f} ms",
            f"{decode['memory_seconds'] * 1e3:.2f} ms",
            f"{decode['exchange_seconds'] * 1e3:.2f} ms",
            f"{decode['model_sent_bytes'] / 1e6:.1f}, {decode['compiled_sent_bytes'] / 1e6:.1f} MB",
            rates(decode),
        ]
        print("| " + " | ".join(cells) + " |")
    plot(found, target)


def about(case: tuple) -> list[str]:
    chip, devices, layout, mesh, rows, length = case
    place = f"{layout} ({mesh.replace(',', ', ')})" if mesh and "," in mesh else layout or "one"
    return [f"{devices} {chip}", place, f"{rows} x {length:,}"]


def rates(line: dict) -> str:
    """Returns the rate by the roofline, and that by the TPU compiler where there is one."""
    compiled = line["compiler_tokens_per_second"]
    return f"{line['tokens_per_second']:,.0f}, " + (f"{compiled:,.0f}" if compiled else "-")


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


def mark(line: dict) -> str:
    return "*" if "CPU" in line["compiler"] else ""


def verdict(*lines: dict) -> str:
    verdicts = [line["fits"] for line in lines]
    return "no" if False in verdicts else "yes" if all(verdicts) else "but for *"


def plot(found: dict, target: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, cases, title in zip(
        figure.subplots(1, 2),
        (STRONG, WEAK),
        ("Strong scaling: 8 rows in all", "Weak scaling: 8 rows a device"),
        strict=True,
    ):
        devices = [case[1] for case in cases]
        lines = [found[name_of(case, False)]["decode"] for case in cases]
        rates = [line["tokens_per_second"] for line in lines]
        serial = [line["tokens_per_second_without_overlap"] for line in lines]
        ideal = [rates[0] * n / devices[0] for n in devices]
        axes.plot(devices, ideal, ":", color="0.6", label="in proportion to devices")
        axes.plot(devices, rates, "o-", color="black", label="at best (roofline)")
        axes.plot(devices, serial, "s--", color="0.4", label="if exchanges wait for the rest")
        axes.set(xscale="log", yscale="log", xlabel="v6e chips", ylabel="tokens/s", title=title)
        axes.set_xticks(devices, map(str, devices))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(target, dpi=120)


if __name__ == "__main__":
    main()

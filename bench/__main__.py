"""fastpo and every installed peer on the same work: ``python -m bench --preset cpu|gpu|quick --out DIR``.

Every contender runs in fresh processes, the contenders taking turns, after its results have been compared with float64.
If fastpo fails that comparison nothing is written and the exit status is 1. Otherwise DIR gets NAME.json, NAME.md and
pictures. The preset gpu takes under 9 minutes. ``--preset step`` measures whole training steps; see `bench.step`.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path

import torch

from bench import step
from bench.contenders import CONTENDERS
from bench.machine import describe
from bench.pictures import draw
from bench.presets import PRESETS
from bench.report import full_report
from bench.runner import GateError, Session
from bench.step import STEP_PRESETS


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    command = "python -m bench " + " ".join(_without_paths(argv))
    presets = argparse.ArgumentParser(add_help=False)
    presets.add_argument("--preset")
    if presets.parse_known_args(argv)[0].preset in STEP_PRESETS:
        return step.main(argv, command)
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=[*PRESETS, *STEP_PRESETS], help="default: gpu where there is one, else cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for the results")
    parser.add_argument("--only", action="append", choices=CONTENDERS, metavar="NAME", help="a contender; repeatable")
    parser.add_argument("--repeats", type=int, help="rounds of fresh processes")
    parser.add_argument("--tokens", type=int, help="only the points of so many tokens")
    parser.add_argument("--work", help="only the points of this work")
    parser.add_argument("--budget", type=float, help="seconds for everything")
    parser.add_argument("--threads", type=int, help="threads of a worker; the machine's own choice by default")
    arguments = parser.parse_args(argv)
    preset = PRESETS[arguments.preset or ("gpu" if torch.cuda.is_available() else "cpu")]
    device = torch.device(preset.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        print(f"preset {preset.name} needs a GPU", file=sys.stderr)
        return 2
    points = [spec for spec in preset.points if arguments.tokens in (None, spec.tokens)]
    points = [spec for spec in points if arguments.work in (None, spec.work)]
    preset = dataclasses.replace(preset, points=tuple(points), budget=arguments.budget or preset.budget)
    with tempfile.TemporaryDirectory() as folder:
        session = Session(
            preset, device, arguments.only or list(CONTENDERS),
            repeats=arguments.repeats or preset.repeats, threads=arguments.threads, folder=Path(folder),
        )  # fmt: skip
        try:
            session.run()
        except GateError as error:
            print(f"no report: {error}", file=sys.stderr)
            return 1
    meta = describe(device, command, session.machine["threads"]) | {"preset": preset.name}
    result = {"meta": meta} | session.as_json()
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"{preset.name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (arguments.out / f"{preset.name}.md").write_text(full_report(result))
    draw(result, arguments.out)
    print(full_report(result))
    return 0


def _without_paths(arguments: list[str]) -> list[str]:
    """The arguments that say what was measured, not where it was written."""
    kept = [x for x in arguments if not x.startswith("--out=")]
    if "--out" in kept:
        at = kept.index("--out")
        del kept[at : at + 2]
    return [f'"{x}"' if " " in x else x for x in kept]


if __name__ == "__main__":
    sys.exit(main())

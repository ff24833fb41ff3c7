"""The `fastpo` command: train, eval, sample, score, rso, rerank, compare, report, plan, explain, methods, demo."""

import argparse
import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Sequence

INPUT_ERRORS = (ValueError, TypeError, OSError)
# Commands from files to a file. Each is a module with `Arguments`, a dataclass, and `run`, which returns what to print.
FILE_COMMANDS = {
    "sample": ("fastpo.sample", "draw several responses of each prompt; goes on where it was stopped"),
    "score": ("fastpo.score", "add a reward model's rewards, and of Gaussian ones the deviations, to responses"),
    "rso": ("fastpo.rso", "choose among scored responses by statistical rejection sampling, and form pairs"),
    "rerank": ("fastpo.rerank", "of scored responses give the best, or draw one, under pi_ref exp(reward / beta)"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, or 1 for bad input, a diverging loss, a disk that is full.

    Raises:
        SystemExit: bad usage (2), SIGTERM (143).
    """
    parser = _parser()
    arguments, overrides = parser.parse_known_args(argv)
    command = arguments.command
    if overrides and command in WITHOUT_OVERRIDES:
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    logging.basicConfig(level=logging.INFO, format="fastpo: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    if command in WITHOUT_OVERRIDES:
        return WITHOUT_OVERRIDES[command](arguments)
    if command == "plan":
        return _plan(arguments, overrides)
    if command in FILE_COMMANDS:
        return _reporting_bad_input(lambda: _from_file_to_file(command, overrides))
    return {"train": _train, "eval": _eval, "explain": _explain}[command](arguments.recipe, overrides)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastpo", description="Preference optimisation without logits in memory.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in (
        ("train", "train what a recipe says; any of its keys can be overridden: --key value"),
        ("eval", "evaluate the model that a recipe left in its output_dir"),
        ("explain", "say what a recipe optimises, in words and as a formula; needs no model and no data"),
    ):
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.add_argument("recipe", help="YAML file")
    for name, (_, text) in FILE_COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False, add_help=False)
    text = "predict a recipe's peak memory, what would make it fit, and the most that fits; reads no weights, no data"
    planned = commands.add_parser("plan", help=text, description=text, allow_abbrev=False)
    planned.add_argument("recipe", help="YAML file")
    planned.add_argument("--memory", help="what there is, such as 24GB (default: this machine's GPU, if it has one)")
    planned.add_argument("--gpu", help="a card by its name instead, such as RTX-4090, A100-80GB or H100")
    planned.add_argument("--cpu", action="store_true", help="plan for training on a CPU")
    planned.add_argument("--from_data", action="store_true", help="take the rows' lengths from the dataset")
    text = "run a study, methods x data x seeds, as a plan says, and report; goes on where it was stopped"
    compared = commands.add_parser("compare", help=text, description=text, allow_abbrev=False)
    compared.add_argument("plan", help="YAML file, see docs/laboratory.md")
    compared.add_argument("--output_dir", help="where results go (default: the plan's)")
    compared.add_argument("--processes", type=int, help="at once (default: the plan's)")
    compared.add_argument("--seeds", type=_seeds, help="how many, or a list such as 3,4,5 (default: the plan's)")
    compared.add_argument("--data", type=_names, help="names of the plan's data, with commas (default: all)")
    compared.add_argument("--methods", type=_names, help="names of the plan's methods, with commas (default: all)")
    text = "remake a study's report from its results"
    reported = commands.add_parser("report", help=text, description=text, allow_abbrev=False)
    reported.add_argument("folder", metavar="DIR", help="the output_dir of a fastpo compare")
    commands.add_parser("methods", help="list the presets: formula, source and settings")
    demo = commands.add_parser("demo", help="sft and dpo of a tiny Qwen3 on generated data, in minutes on a CPU")
    demo.add_argument("--output_dir", default="runs/demo")
    return parser


def _train(path: str, overrides: list[str]) -> int:
    prepared = []

    def prepare() -> None:
        from fastpo.recipe import parse_recipe
        from fastpo.run import prepare_training

        _tell_translation(path, overrides, training=True)
        prepared.append(prepare_training(*parse_recipe(path, overrides)))

    status = _reporting_bad_input(prepare)
    if status:
        return status
    from fastpo.files import SaveError
    from fastpo.reporting import final_table
    from fastpo.run import run_training

    (trainer,) = prepared
    try:
        pictures = run_training(trainer)
    except (FloatingPointError, SaveError) as error:
        return _complain(error)
    if trainer.is_world_process_zero():
        output_dir = trainer.args.output_dir
        print(f"\n{final_table(output_dir)}\n\nmodel, metrics.jsonl: {output_dir}")
        print(f"pictures: {' '.join(str(picture) for picture in pictures)}")
    return 0


def _eval(path: str, overrides: list[str]) -> int:
    def evaluate() -> None:
        from fastpo.recipe import parse_recipe
        from fastpo.run import evaluate

        _tell_translation(path, overrides)
        for name, value in sorted(evaluate(*parse_recipe(path, overrides)).items()):
            print(f"{name:32} {value:.4f}")

    return _reporting_bad_input(evaluate)


def _explain(path: str, overrides: list[str]) -> int:
    def explain_recipe() -> None:
        from fastpo.explain import explain
        from fastpo.recipe import parse_objective

        _tell_translation(path, overrides)
        print(explain(*parse_objective(path, overrides)))

    return _reporting_bad_input(explain_recipe)


def _plan(arguments: argparse.Namespace, overrides: list[str]) -> int:
    def print_plan() -> None:
        from fastpo.plan_report import plan

        a = arguments
        _tell_translation(a.recipe, overrides)
        print(plan(a.recipe, overrides, a.memory, a.gpu, on_cpu=a.cpu, from_data=a.from_data))

    return _reporting_bad_input(print_plan)


def _demo(arguments: argparse.Namespace) -> int:
    from fastpo.demo import run_demo

    return _reporting_bad_input(lambda: run_demo(arguments.output_dir))


def _compare(arguments: argparse.Namespace) -> int:
    named = {name: getattr(arguments, name) for name in ("output_dir", "processes", "seeds", "data", "methods")}
    failed: list[BaseException] = []

    def run() -> None:
        _check_lab()
        from fastpo.lab.compare import RunsFailedError, compare

        try:
            print(compare(arguments.plan, **named))
        except RunsFailedError as error:
            failed.append(error)

    try:
        status = _reporting_bad_input(run)
    except KeyboardInterrupt:
        return _complain(KeyboardInterrupt("interrupted; the same command goes on")) + 129
    return _complain(failed[0]) if failed else status


def _report(arguments: argparse.Namespace) -> int:
    def report() -> None:
        _check_lab()
        from fastpo.lab.report import make_report

        print(*make_report(arguments.folder), sep="\n")

    return _reporting_bad_input(report)


def _check_lab() -> None:
    """Raise ValueError where a package of the extra [lab] is missing: some are imported at the end of a run."""
    missing = [name for name in ("rouge_score", "sacrebleu", "scipy") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"fastpo compare and fastpo report need {', '.join(missing)}: pip install 'fastpo[lab]'")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _seeds(text: str) -> int | list[int]:
    return [int(part) for part in text.split(",")] if "," in text else int(text)


def _from_file_to_file(command: str, argv: list[str]) -> None:
    from fastpo.yaml_arguments import parse_arguments

    module = importlib.import_module(FILE_COMMANDS[command][0])
    print(module.run(parse_arguments(module.Arguments, argv, f"fastpo {command}")))


def _tell_translation(path: str, overrides: list[str], training: bool = False) -> None:
    """Print what became of the keys of a LLaMA-Factory recipe; of fastpo's own there is nothing to tell."""
    from fastpo.recipe import read_translation

    translation = read_translation(path, overrides)
    if translation is None:
        return
    if training and not translation.trains:
        raise ValueError("do_train must not be false for fastpo train; fastpo eval evaluates what a recipe left")
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"{translation.report}\n")


def _methods(arguments: argparse.Namespace) -> int:
    from fastpo.methods import METHODS

    print("preset: NAME in a recipe, or PreferenceConfig.preset(NAME). b: beta, h: difference of log-ratios,")
    print("h_w, h_l: log-ratios of chosen and rejected, _bar: mean per token. Whatever is not set is at its default.")
    for name, method in METHODS.items():
        settings = ", ".join(f"{key}={value!r}" for key, value in method.settings.items())
        print(f"\n{name:16} {method.formula}\n{'':16} {method.source}\n{'':16} {settings or 'defaults'}")
    return 0


def _reporting_bad_input(work: Callable[[], object]) -> int:
    try:
        work()
    except INPUT_ERRORS as error:
        return _complain(error)
    return 0


def _complain(error: BaseException) -> int:
    """One line, however many the error's message has."""
    print(f"fastpo: error: {' '.join(str(error).split())}", file=sys.stderr)
    return 1


# Commands whose arguments are all known.
WITHOUT_OVERRIDES: dict[str, Callable[[argparse.Namespace], int]] = {
    "demo": _demo,
    "methods": _methods,
    "compare": _compare,
    "report": _report,
}

if __name__ == "__main__":
    sys.exit(main())

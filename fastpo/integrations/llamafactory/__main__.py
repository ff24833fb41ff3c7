"""The command ``fastpo-llamafactory train RECIPE.yaml``: LLaMA-Factory's own training with fastpo's objectives."""

import importlib.metadata
import sys
from typing import Any

VERSION = "0.9.5"
USAGE = "usage: fastpo-llamafactory train RECIPE.yaml [KEY=VALUE ...], keys as LLaMA-Factory's and fastpo's"


def main() -> None:
    """Run the command in sys.argv; launched by torchrun, in each process with or without the word `train`."""
    from torch.distributed import is_torchelastic_launched

    launched = is_torchelastic_launched()
    if len(sys.argv) < 2 or (sys.argv[1] != "train" and not launched):
        sys.exit(USAGE)
    _check_installed()
    install()
    from llamafactory import launcher
    from llamafactory.train import tuner

    if not launched:
        launcher.__file__ = __file__  # which is what it has torchrun start for several devices
        launcher.launch()
        return
    if sys.argv[1] == "train":
        del sys.argv[1]
    tuner.run_exp()


def install() -> None:
    """Put fastpo's arguments and trainers in the places from which LLaMA-Factory's workflows take its own."""
    from llamafactory.hparams import FinetuningArguments, parser
    from llamafactory.train import tuner
    from llamafactory.train.dpo import trainer as dpo_trainer
    from llamafactory.train.rm import workflow as rm_workflow

    from fastpo.integrations.llamafactory.arguments import PreferenceFinetuningArguments
    from fastpo.integrations.llamafactory.dpo import StatsDPOTrainer
    from fastpo.integrations.llamafactory.reward import StatsRewardTrainer

    classes = parser._TRAIN_ARGS
    classes[classes.index(FinetuningArguments)] = PreferenceFinetuningArguments
    tuner.get_train_args = _get_train_args
    dpo_trainer.CustomDPOTrainer = StatsDPOTrainer
    rm_workflow.PairwiseTrainer = StatsRewardTrainer


def _get_train_args(args: Any = None) -> Any:
    from llamafactory.hparams import get_train_args

    from fastpo.integrations.llamafactory.arguments import check_model_arguments

    parsed = get_train_args(args)
    model_args, _, _, finetuning_args, _ = parsed
    if finetuning_args.preference_config is not None:
        check_model_arguments(model_args)
        adapters = model_args.adapter_name_or_path
        finetuning_args.heads_source = adapters[-1] if adapters else model_args.model_name_or_path
    return parsed


def _check_installed() -> None:
    try:
        version = importlib.metadata.version("llamafactory")
    except importlib.metadata.PackageNotFoundError:
        sys.exit(f"fastpo-llamafactory needs llamafactory: pip install llamafactory=={VERSION}")
    if version != VERSION:
        sys.exit(f"fastpo-llamafactory puts its parts into llamafactory {VERSION}, but {version} is installed")
    from llamafactory.extras.misc import is_env_enabled

    for name in ("USE_V1", "USE_MCA", "USE_RAY", "USE_KT"):
        if is_env_enabled(name):
            sys.exit(f"{name} must not be set: it trains by a program into which fastpo does not go")


if __name__ == "__main__":
    main()

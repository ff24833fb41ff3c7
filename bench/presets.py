"""What ``python -m bench --preset NAME`` measures."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from bench.problem import WORKS, Spec

VOCAB = 151936
QWEN = {"Qwen2.5-0.5B": 896, "Qwen3-0.6B": 1024, "Qwen3-4B": 2560, "Qwen3-8B": 4096}
HALF = 0.5


@dataclass(frozen=True)
class Preset:
    """Points in order of importance, and the time they may take."""

    name: str
    dtype: str
    points: tuple[Spec, ...]
    accuracy: Spec
    repeats: int  # rounds of fresh processes
    budget: float  # seconds for everything
    process_limit: float  # seconds for one process
    seconds: float = 0.4  # a GPU point is repeated for about so long
    fresh_per_point: bool = False  # a process a point, not only a process a contender
    device: str | None = None  # where it must run
    main_only: frozenset[str] = frozenset()  # contenders that run at the main points only
    most_tokens: Mapping[str, int] = field(default_factory=dict)  # contenders that stay below so many tokens

    def wants(self, name: str, spec: Spec) -> bool:
        if spec.contenders and name not in spec.contenders:
            return False
        return (spec.main or name not in self.main_only) and spec.tokens <= self.most_tokens.get(name, spec.tokens)


def _cpu() -> Preset:
    def point(work: str, tokens: int, fraction: float = 1.0) -> Spec:
        return Spec(work, tokens, QWEN["Qwen2.5-0.5B"], VOCAB, "float32", fraction, main=True)

    return Preset(
        "cpu",
        "float32",
        (
            *(point(work, tokens) for tokens in (512, 2048) for work in ("frozen", "trainable")),
            point("dpo_frozen", 1024, HALF),
        ),
        accuracy=Spec("forward", 2048, QWEN["Qwen2.5-0.5B"], VOCAB, "bfloat16", HALF),
        repeats=3,
        budget=3600,
        process_limit=300,
        fresh_per_point=True,
        device="cpu",
        # Full logits in another guise: once is enough.
        most_tokens={"eager, torch.compile": 512, "Apple CCE": 512, "eager with entropy": 0},
    )


def _gpu() -> Preset:
    def point(
        work: str, tokens: int = 8192, model: str = "Qwen3-8B", fraction: float = 1.0, main: bool = False
    ) -> Spec:
        return Spec(work, tokens, QWEN[model], VOCAB, "bfloat16", fraction, main)

    trained = ("frozen", "trainable")
    return Preset(
        "gpu",
        "bfloat16",
        (
            *(point(work, main=True) for work in ("forward", *trained)),
            *(point(work, fraction=HALF, main=True) for work in ("dpo_frozen", "dpo_trainable")),
            *(point(work, tokens) for tokens in (1024, 4096, 16384, 65536) for work in trained),
            *(point(work, model=model) for model in list(QWEN)[:3] for work in trained),
            *(point("dpo_frozen", fraction=fraction) for fraction in (0.25, 1.0)),
        ),
        accuracy=Spec("forward", 8192, QWEN["Qwen3-8B"], VOCAB, "bfloat16", HALF),
        repeats=3,
        budget=500,
        process_limit=75,
        device="cuda",
        main_only=frozenset(
            {"eager, torch.compile", "eager with entropy", "Apple CCE, no filter", "fastpo chunked", "fastpo skip 1e-3"}
        ),
    )


def _quick() -> Preset:
    return Preset(
        "quick",
        "float32",
        tuple(
            Spec(work, tokens, 64, 1000, "float32", HALF if work.startswith("dpo") else 1.0, main=tokens == 128)
            for tokens in (64, 128)
            for work in WORKS
        ),
        accuracy=Spec("forward", 128, 64, 1000, "bfloat16", HALF),
        repeats=1,
        budget=300,
        process_limit=60,
        seconds=0.01,
        main_only=frozenset({"eager, torch.compile", "Apple CCE", "Liger chunked DPO"}),
    )


PRESETS = {preset.name: preset for preset in (_cpu(), _gpu(), _quick())}

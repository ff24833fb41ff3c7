"""The tables of docs/llamafactory.md, made from `KEYS`; `python tests/llamafactory_table.py` writes them there."""

import json
from pathlib import Path

from fastpo.integrations.llamafactory_recipes.keys import KEYS

PAGE = Path(__file__).parents[1] / "docs" / "llamafactory.md"
START, END = "<!-- from the table in the code: python tests/llamafactory_table.py -->\n", "<!-- end -->\n"


def tables() -> str:
    lines = ["| LLaMA-Factory | its default | here | |", "|---|---|---|---|"]
    for name, key in KEYS.items():
        if key.kind in ("same", "renamed", "by"):
            ours = key.ours or name
            ours = ours if " " in ours else f"`{ours}`"
            default = "" if key.default is None else f"`{json.dumps(key.default)}`"
            lines.append(f"| `{name}` | {default} | {ours} | {key.why} |")
    for kind, title in (("harmless", "harmless, because"), ("refused", "refused, because")):
        by_reason: dict[str, list[str]] = {}
        for name, key in KEYS.items():
            if key.kind == kind:
                by_reason.setdefault(key.why, []).append(f"`{name}`")
        lines += ["", f"| keys | {title} |", "|---|---|"]
        lines += [f"| {', '.join(names)} | {why} |" for why, names in by_reason.items()]
    return "\n".join(lines) + "\n"


def page_with_tables(page: str) -> str:
    before, _, rest = page.partition(START)
    return before + START + tables() + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(page_with_tables(PAGE.read_text()))

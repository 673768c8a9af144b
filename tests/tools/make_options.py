"""Write docs/reference/options.md from the schema: `python tests/tools/make_options.py`; a test compares the two."""

import textwrap
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import get_type_hints

from fledge.conf.schema import Config
from fledge.conf.schema.describe import Option, describe, merge_stages

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "options.md"
_HEAD = """# Options

```
fledge train experiment=demo name=demo train.lr=5e-4 --cfg job     # what a command would use
```

Every command takes every option, as `group.option=value`. `null` is a value. Lists are written `[a, b]`, mappings
`{name: value}`; a shell needs quotes around both. A wrong name or value ends the command with
exit code 2 and a sentence that names the option.

Files of values are chosen by group: `experiment=`, `verifier=`, `draft=`, `data=`, `deepspeed=`, `cluster=`.
They are the YAML files in `conf/`.

This page is written by `python tests/tools/make_options.py` from `conf/schema/`. In brackets: the default.
"""


def text() -> str:
    """Return the page."""
    options = merge_stages(describe(Config))
    run = [option for option in options if "." not in option.name]
    parts = [_HEAD, "## The run\n", "A name, a folder, and what to do with artifacts that differ.\n", *_items(run)]
    for group, kind in get_type_hints(Config).items():
        if is_dataclass(kind):
            own = [option for option in options if option.name.startswith(f"{group}.")]
            parts += [f"\n## {group}\n", f"{(kind.__doc__ or '').strip()}\n", *_items(own)]
    return "\n".join(parts) + "\n"


def _items(options: list[Option]) -> Iterator[str]:
    for option in options:
        values = [option.limits] if option.type.endswith("or text") else [option.type, option.limits]
        item = f"- `{option.name}` (`{option.default}`): {option.meaning} *({', '.join(filter(None, values))})*."
        yield textwrap.fill(item, 118, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    PAGE.write_text(text())

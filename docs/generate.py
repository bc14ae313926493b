"""Write docs/techniques.md and docs/cli.md from the code; `--check` fails when they are stale."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

HERE = Path(__file__).parent


def techniques() -> str:
    from harness.plugins import load_plugins

    plugins = load_plugins()
    lines = ["# Techniques", "", "Written by `make docs` from the code; do not edit.", ""]
    for name, cls in plugins.techniques.items():
        lines += [f"## {name}", "", cls.summary(), ""]
        rest = (cls.__doc__ or "").split("\n\n", 1)
        if len(rest) > 1:
            lines += [" ".join(rest[1].split()), ""]
        if cls.paper:
            lines += [f"{cls.paper.authors} ({cls.paper.year}). *{cls.paper.title}*. {cls.paper.url}", ""]
        lines += [f"Family {cls.family}, version {cls.version}; needs {', '.join(sorted(cls.needs)) or 'only a model'}.", ""]
        lines += [f"**How to read it.** {cls.reading}", ""]
        if cls.caveats:
            lines += [f"**What it does not show.** {cls.caveats}", ""]
        if cls.model_fields:
            lines += ["| parameter | default | meaning |", "|---|---|---|"]
            schema = cls.model_json_schema()["properties"]
            for field, value in cls.model_fields.items():
                default = json.dumps(value.get_default(call_default_factory=True), default=list)
                meaning = str(value.description).replace("|", "\\|")
                lines.append(f"| `{field}` | `{default}` | {meaning}{_choices(schema[field])} |")
            lines.append("")
    return "\n".join(lines)


def _choices(schema: dict[str, Any]) -> str:
    return f" ({', '.join(map(str, schema['enum']))})" if "enum" in schema else ""


def cli() -> str:
    from harness.cli.main import COMMANDS
    from harness.cli.main import cli as root

    lines = ["# Command line", "", "Written by `make docs` from the code; do not edit.", ""]
    pages: list[tuple[str, click.Command]] = [("harness", root)]
    context = click.Context(root, info_name="harness")
    for name in COMMANDS:
        command = root.get_command(context, name)
        assert command is not None
        pages.append((f"harness {name}", command))
        if isinstance(command, click.Group):
            pages += [(f"harness {name} {sub}", child) for sub, child in sorted(command.commands.items())]
    for title, command in pages:
        with click.Context(command, info_name=title, terminal_width=100) as ctx:
            lines += [f"## {title}", "", "```", command.get_help(ctx), "```", ""]
    return "\n".join(lines)


PAGES = {"techniques.md": techniques, "cli.md": cli}


def main() -> int:
    stale = []
    for name, write in PAGES.items():
        text = write().rstrip() + "\n"
        path = HERE / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
            if "--check" not in sys.argv:
                path.write_text(text, encoding="utf-8")
    if "--check" in sys.argv and stale:
        print(f"stale: {', '.join(stale)}; run `make docs`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

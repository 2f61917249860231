"""All settings of TMM-NN, from the code that checks them: at the end of `--help`, and as the page docs/settings.md.

python -m tmm_engine.cli.settings > docs/settings.md
"""

import click

from tmm_engine.rerank.settings import PRESETS, Setting, described

PAGE = """\
# Settings of TMM-NN

What `engine search --set NAME=VALUE`, `engine build-index --set …` and `TmmConfig.with_settings` take. This page is
made from the code: `python -m tmm_engine.cli.settings > docs/settings.md`.

A setting that would have no effect is refused, with the reason. *Goes with* says when it has one. `build-index --set`
takes those of the global trigger: `stretch`, `trigger.…`, `blend`, `clamp`, `intensity`, `seed`. `--stretch`,
`--recognition` and `--seed` are short for the settings of the same name.
"""


class CommandWithSettings(click.Command):
    """A command whose help ends with the settings that its `--set` takes."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Name, values and meaning of each."""
        super().format_epilog(ctx, formatter)
        with formatter.section("Settings (--set)"):
            formatter.write_dl([(each.name, _in_short(each)) for each in described()])


def settings_page() -> str:
    """Markdown: a table of all settings, with the presets' own values."""
    presets = {name: config.to_json() for name, config in PRESETS.items()}
    heads = ["setting", "meaning", "values", *(f"`{name}`" for name in presets), "source", "goes with"]
    lines = [heads, ["---"] * len(heads)]
    for each in described():
        values = [_value(each, config) for config in presets.values()]
        goes_with = " or ".join(each.goes_with) or "everything"
        lines.append([f"`{each.name}`", each.meaning, each.values, *values, each.source, goes_with])
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return f"{PAGE}\n{table}\n"


def _in_short(each: Setting) -> str:
    source = "" if each.source == "ours" else f" ({each.source})"
    goes_with = f" With {' or '.join(each.goes_with)}." if each.goes_with else ""
    own = "; ".join(f"{name}: {_value(each, config.to_json())}" for name, config in PRESETS.items())
    return f"{each.meaning}{source}: {each.values} ({own}).{goes_with}"


def _value(each: Setting, config: dict[str, object]) -> str:
    """A preset's own value; a dash where the setting has no effect in it."""
    if each.name not in config:
        return "–"
    value = config[each.name]
    return str(value).lower() if isinstance(value, bool) or value is None else f"{value}"


if __name__ == "__main__":
    click.echo(settings_page(), nl=False)

"""Write docs/options.md from the parsers of create_mar_file.py and request.py: `make options`."""

import argparse
from pathlib import Path

import create_mar_file
from edge import options

PAGE = Path(__file__).with_name("options.md")
INTRODUCTION = """# Options

`make options` writes this page from the parsers of the two scripts; their `--help` prints the same flags.
"""
VARIABLES = """
## Environment variables

| variable | read by | meaning |
| --- | --- | --- |
| `TORCHSERVE_TOKEN` | `request.py` | the token, without the word Bearer; `--token-file` has precedence over it |
| `REQUESTS_CA_BUNDLE` | `request.py` | a file with the certificates to trust, for a private certificate authority |
| `HTTPS_PROXY`, `HTTP_PROXY`, `NO_PROXY` | `request.py` | a proxy on the way to `--url` |
| `OPENCV_FFMPEG_CAPTURE_OPTIONS` | `request.py` | [options of FFmpeg](cameras-and-outputs.md#options-of-ffmpeg) |
| `OPENCV_FFMPEG_LOGLEVEL` | `request.py` | FFmpeg's own messages, which are turned off unless it is set |
| `TORCH_HOME` | `create_mar_file.py` | the folder of downloaded weights (default: `~/.cache/torch`) |
| `TS_CONFIG_FILE` | `torchserve` | its configuration; it has precedence over `--ts-config` |
| `JAVA_HOME` | `torchserve` | the Java runtime, version 17 or newer |
| `TEMP` | `torchserve` | the folder of the unpacked archives, from which workers start |
"""


def options_page() -> str:
    """Return the text of docs/options.md."""
    create = section("create_mar_file.py", create_mar_file.new_parser())
    return "\n".join([INTRODUCTION, create, section("request.py", options.new_parser()) + VARIABLES])


def section(script: str, parser: argparse.ArgumentParser) -> str:
    """Return a script's section: its description, a table of its flags, and its exit codes."""
    lines = [f"## {script}", "", parser.description or "", "", "| flag | meaning |", "| --- | --- |"]
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.help != argparse.SUPPRESS]
        actions = [action for action in actions if not isinstance(action, argparse._HelpAction)]
        if actions and group.title not in ("options", "positional arguments"):
            lines.append(f"| **{group.title}** | |")
        lines += [f"| {flags(action)} | {meaning(parser, action)} |" for action in actions]
    epilog = parser.epilog or ""
    return "\n".join([*lines, "", f"{epilog[:1].upper()}{epilog[1:]}."]) + "\n"


def flags(action: argparse.Action) -> str:
    """Return how a flag is typed, with the name of its value."""
    choices = r"\|".join(map(str, action.choices)) if action.choices else None
    name_of_value = choices or action.metavar or action.dest.upper()
    value = {0: "", "?": f" [{name_of_value}]"}.get(action.nargs, f" {name_of_value}")
    return ", ".join(f"`{name}{value}`" for name in action.option_strings)


def meaning(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    """Return the help of a flag, with its values filled in as argparse does."""
    return parser._get_formatter()._expand_help(action).replace("|", r"\|")


if __name__ == "__main__":
    PAGE.write_text(options_page(), encoding="utf-8")

"""What the verbs share: how words of a command line are read and refused."""

from __future__ import annotations

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from ssl_pretrain.errors import UsageError
from ssl_pretrain.named import nearest


def new_parser(name: str, text: str | None) -> ArgumentParser:
    """The parser of a verb; the first line of `text`, its docstring, is its help."""
    summary = (text or "").splitlines()[0]
    return ArgumentParser(prog=f"ssl-pretrain {name}", description=summary, exit_on_error=False)


def parsed(parser: ArgumentParser, words: list[str]) -> Namespace:
    """The values; raises `UsageError` in one line, with the nearest known option for an unknown one."""
    known = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
    for word in words:
        option = word.partition("=")[0]
        if option.startswith("--") and option not in known:
            raise UsageError(f"unknown option {option}{nearest(option, known)}; see {parser.prog} --help")
    try:
        return parser.parse_args(words)
    except ArgumentError as error:
        from ssl_pretrain.config import one_line

        raise UsageError(f"{one_line(str(error))}; see {parser.prog} --help") from error


def split(words: list[str], options: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """The words of these options, and all others.

    >>> split(["--seed", "3", "--out", "a", "--b=1", "--out=c"], ("--out",))
    (['--out', 'a', '--out=c'], ['--seed', '3', '--b=1'])
    """
    mine: list[str] = []
    others: list[str] = []
    taken = False  # whether the last word was one of the options, whose value comes now
    for word in words:
        named_here = word.partition("=")[0] in options
        (mine if named_here or (taken and not word.startswith("--")) else others).append(word)
        taken = named_here and "=" not in word
    return mine, others

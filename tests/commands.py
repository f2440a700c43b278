"""Commands that are not run where tests run: they are parsed by the programs' own parsers, running nothing."""

import click

from workflows import __main__ as command
from workflows.options import direct_options, recipe_options


def check_command(words: list[str]) -> None:
    """AssertionError or click.UsageError where a program, a verb or an option is not known."""
    program, *arguments = words
    if program == "ray":
        submitted = parse_ray(arguments)
        if submitted:
            check_command(submitted)
    else:
        assert program == "rescribe", words
        parse_rescribe(arguments)


def parse_ray(arguments: list[str]) -> list[str]:
    """Parse `ray ...` with Ray's own parsers, running nothing; returns the arguments that are no options."""
    from ray.scripts.scripts import cli

    here: click.Command = cli
    context = click.Context(here, info_name="ray")
    while isinstance(here, click.Group):
        name, found, arguments = here.resolve_command(context, arguments)
        assert found is not None
        here, context = found, click.Context(found, info_name=name, parent=context)
    values, *_ = here.make_parser(context).parse_args(list(arguments))
    for parameter in here.params:  # choices and types too
        if isinstance(parameter, click.Option) and parameter.name in values:
            parameter.type_cast_value(context, values[parameter.name])
        assert not (parameter.required and parameter.name not in values), parameter.name
    return list(values.get("entrypoint", ()))


def parse_rescribe(arguments: list[str]) -> None:
    """Parse `rescribe ...`, running nothing."""
    verb, *rest = arguments
    assert verb in {**command.VERBS, **command.STEPS} or verb == "--help", verb
    if verb in ("run", "plan", "settings"):
        recipe_options(rest, verb)
    elif verb == "recaption" and "--images" not in rest:
        direct_options(rest)

"""`rescribe`: run and plan recipes, run single steps, list and show what was made."""

import importlib.metadata
import os
import shlex
import signal
import sys
import traceback
from typing import Any

from workflows.commands import (
    ON_RECIPES,
    STEPS,
    VERBS,
    ChoiceError,
    check_recipe,
    choose,
    function,
    help_of,
    load,
    overview,
    say,
)


def main(arguments: list[str] | None = None) -> None:
    """The command line; ends the process with 0, or with 1 or 2 and a sentence on standard error."""
    is_command, arguments = arguments is None, sys.argv[1:] if arguments is None else arguments
    try:
        results = _dispatch(arguments)
        if "--json" in arguments and results is not None:
            from infra import strict

            print(strict.dumps(results))
        sys.stdout.flush()
    except KeyboardInterrupt:
        if is_command:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ray ends with Python, and is not to be cut as it does
        say("Stopped. Give the same command again to continue.")
        sys.exit(130)
    except BrokenPipeError:  # who read has gone, as `head` does
        for stream in (sys.stdout, sys.stderr):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # what is left is written when Python ends
        sys.exit(141)
    except (ValueError, OSError, RuntimeError, ArithmeticError) as error:
        if os.environ.get("RESCRIBE_TRACEBACK"):
            traceback.print_exc()
        say(f"rescribe: {_sentence(error)}")
        sys.exit(1)


def _understand(line: list[str]) -> Any:
    """The options of a line that a cluster can run; nothing is done."""
    from workflows import options

    verb, arguments = line[0], line[1:]
    if verb == "run":
        return options.recipe_options(arguments, "run")
    if verb == "retry":
        return options.retry_options(arguments)
    if verb == "recaption" and "--images" not in arguments:
        return options.direct_options(arguments)
    if verb == "export":
        return options.export_options(arguments)
    if verb in VERBS and verb not in STEPS:
        raise ValueError(f"`{verb}` is done here, without a cluster. Submit run, retry, recaption, export or a step.")
    choose(verb, {**VERBS, **STEPS}, "command")
    return options.step_options(options.WORK[verb], arguments)


def _dispatch(arguments: list[str]) -> dict[str, Any] | None:
    verb, rest = (arguments or ["--help"])[0], arguments[1:]
    if verb in ("-h", "--help", "help"):
        return print(f"{__doc__}\n{overview()}")
    if verb == "--version":
        return print(f"rescribe {importlib.metadata.version('rescribe')}")
    choose(verb, {**VERBS, **STEPS}, "command")
    if verb in ON_RECIPES:
        if {"-h", "--help"} & {*rest}:
            return print(help_of(verb))
        if rest and not rest[0].startswith("-") and not rest[0].endswith(".json"):
            check_recipe(rest[0])
        if verb == "run" and "--dry-run" in rest:
            line = shlex.join(["rescribe", "plan", *(word for word in rest if word != "--dry-run")])
            raise ValueError(f"`plan` says what would run, and why: {line}")
        rest = _all_options(rest)
    if verb == "submit":
        return function(VERBS[verb])(rest, _understand)
    if verb in VERBS:
        return function(VERBS[verb])(rest)
    return load("verbs").run_step(load("options").WORK[verb], rest)


def _all_options(rest: list[str]) -> list[str]:
    """`--help-all` lists the options of a recipe, or of the demo, whose kind most recipes are of."""
    if "--help-all" not in rest:
        return rest
    return [rest[0] if rest[0] != "--help-all" else "demo", "--help"]


def _sentence(error: BaseException) -> str:
    """What went wrong, without the layers of other processes around it."""
    cause = getattr(error, "cause", None)
    text = str(cause if isinstance(cause, BaseException) else error).strip() or repr(error)
    return text if len(text) < 600 or isinstance(error, ChoiceError) else text[:600] + " ..."


if __name__ == "__main__":
    main()

"""`rescribe`: run and plan recipes, run single steps, list and show what was made."""

import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from infra import strict
from workflows import recipes
from workflows.lookup import ChoiceError
from workflows.options import (
    WORK,
    choose,
    direct_options,
    export_options,
    recipe_options,
    retry_options,
    step_options,
)
from workflows.submit import logs, send, status, stop
from workflows.verbs import (
    export_corpus,
    gallery,
    list_artifacts,
    plan,
    recaption_corpus,
    retry,
    run,
    run_step,
    say,
    settings,
    shapes,
    show,
    verify,
)


def submit(arguments: list[str]) -> dict[str, Any]:
    """Send a recipe or a step to a Ray cluster: `rescribe submit --address http://HEAD:8265 -- run demo --store s3://...`."""
    return send(arguments, _understand)


VERBS: dict[str, Callable[[list[str]], dict[str, Any]]] = {
    "run": run,
    "plan": plan,
    "show": show,
    "settings": settings,
    "list": list_artifacts,
    "shapes": shapes,
    "verify": verify,
    "retry": retry,
    "recaption": recaption_corpus,
    "gallery": gallery,
    "export": export_corpus,
    "submit": submit,
    "status": status,
    "logs": logs,
    "stop": stop,
}


def main(arguments: list[str] | None = None) -> None:
    """The command line; ends the process with 0, or with 1 or 2 and a sentence on standard error."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if not arguments or arguments[0] in ("-h", "--help", "help"):
            print(_help())
            return
        results = _dispatch(arguments[0], arguments[1:])
        if "--json" in arguments:
            print(strict.dumps(results))
    except KeyboardInterrupt:
        say("Stopped. Give the same command again to continue.")
        sys.exit(130)
    except (ValueError, OSError, RuntimeError, ArithmeticError) as error:
        if os.environ.get("RESCRIBE_TRACEBACK"):
            traceback.print_exc()
        say(f"rescribe: {_sentence(error)}")
        sys.exit(1)


def _understand(line: list[str]) -> Any:
    """The options of a line that a cluster can run; nothing is done."""
    verb, arguments = line[0], line[1:]
    if verb == "run":
        return recipe_options(arguments, "run")
    if verb == "retry":
        return retry_options(arguments)
    if verb == "recaption" and "--images" not in arguments:
        return direct_options(arguments)
    if verb == "export":
        return export_options(arguments)
    if verb in VERBS and verb not in WORK:
        raise ValueError(f"`{verb}` is done here, without a cluster. Submit run, retry, recaption, export or a step.")
    return step_options(choose(verb, {**VERBS, **WORK}, "command"), arguments)


def _dispatch(verb: str, arguments: list[str]) -> dict[str, Any]:
    if verb in VERBS:
        return VERBS[verb](arguments)
    return run_step(choose(verb, {**WORK, **VERBS}, "command"), arguments)


def _help() -> str:
    lines = [__doc__ or "", "", "Commands (each with --help):"]
    lines += [f"  {name:<16} {(verb.__doc__ or '').splitlines()[0]}" for name, verb in VERBS.items()]
    lines += ["", "Steps (on finished artifacts):"]
    lines += [f"  {work.name:<16} {(work.work.__doc__ or '').splitlines()[0]}" for work in WORK.values()]
    lines += ["", "Recipes:"]
    lines += [f"  {name:<16} {(make.__doc__ or '').splitlines()[0]}" for name, make in recipes.RECIPES.items()]
    return "\n".join(lines)


def _sentence(error: BaseException) -> str:
    """What went wrong, without the layers of other processes around it."""
    cause = getattr(error, "cause", None)
    text = str(cause if isinstance(cause, BaseException) else error).strip() or repr(error)
    return text if len(text) < 600 or isinstance(error, ChoiceError) else text[:600] + " ..."


if __name__ == "__main__":
    main()

"""lightning-llm VERB ...: the verb first, then plain Hydra. Nothing heavy is imported before a stage runs."""

from __future__ import annotations

import difflib
import glob
import itertools
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lightning_llm import __version__
from lightning_llm.settings import UserError

if TYPE_CHECKING:
    from argparse import Namespace

    from lightning_llm.pipeline.composition import Composition

VERBS = {  # verb -> what it takes besides overrides, what it does
    "run": ("recipe=NAME", "make what is missing of a recipe, stage by stage"),
    "plan": ("recipe=NAME", "show what run would do: tokens, steps, FLOPs, memory, disk, time"),
    "report": ("RUN...", "write one HTML page about one run or several"),
    "generate": ("model=MODEL prompt=TEXT", "continue texts or answer conversations with a finished model"),
    "chat": ("model=MODEL", "talk with a finished model"),
    "store": ("list|verify|remove [ARTIFACT...]", "look after finished artifacts"),
}
POSITIONAL = {"report": "runs", "store": "names"}  # verb -> the setting that words without = stand for
SPEAKING = ("generate", "chat")
# What these take as it stands, not in Hydra's grammar, under the key that it has in the tree (`model` is a group, too);
# the second may be given several times.
VERBATIM = {"model": "model.path", "prompts": "prompts", "system": "system"}
SEVERAL = ("prompt", "stop")
VALUED_FLAGS = ("--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp", "--cfg", "-c", "--package", "-p",
                "--experimental-rerun")  # fmt: skip
INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")  # what --info may be followed by
COMPLETION = ("-sc", "--shell-completion")
SHELLS = re.compile(r"(install|uninstall|query)=(bash|fish|zsh)")
EXAMPLES = """\
  lightning-llm run recipe=qwen2                                       all stages at nano; again: what is missing
  lightning-llm run recipe=qwen2 stages.dpo.objective.beta=0.05        everything before dpo is reused
  lightning-llm run recipe=qwen2 objective@stages.dpo.objective=ipo    swap an option of one stage
  lightning-llm run recipe=qwen2 until=sft | only=dpo | force=[sft]
  lightning-llm run -m recipe=qwen2 seed=0,1,2                         a sweep
  lightning-llm plan recipe=qwen2 scale=paper compute=ddp format=json
  lightning-llm generate model=dpo prompt="reverse 123" template=chat  or chat model=dpo"""
SPEECH = """\
MODEL is an artifact, a Hugging Face directory, or an artifact's name or key in the store.

  prompt=TEXT             generate: what to go on from; may be given several times
  prompts=FILE            generate: *.jsonl with `prompt` or `messages` in each row, else a prompt per line
  template=auto           generate: auto (conversations are rendered, texts continued) | chat (a text is a turn) | raw
  format=text             generate: text | jsonl
  batch_size=16           generate: prompts computed together
  system=TEXT             what a conversation begins with
  max_new_tokens=N        a reply is cut after so many
  temperature=0.7 top_k=20 top_p=0.8 min_p=0.05 repetition_penalty=1.05
                          how tokens are drawn; 0 is greedy. Default: the model's generation_config.json, or greedy
  seed=0                  of sampling
  stop=TEXT               ends a reply and is left out; may be given several times
  rope_scaling={...}      other positions than the model's: {rope_type: yarn, factor: 4, ...}
  dual_chunk.chunk_size=N dual chunk attention of a model that knows N positions (dual_chunk.local_size: N / 4)
  compute=cpu             cpu | gpu; compute.precision=bf16
  store.root=artifacts    where names and keys are looked up"""
FLAGS = """\
  --cfg job             print the composed settings      --info defaults   print where they come from
  --config-dir FOLDER   your own YAML files              -m, --multirun    run every combination of a=1,2 b=x,y
  --version             print the version                --hydra-help      all of Hydra's flags"""


def main() -> None:
    """The console script. Exit codes: 0 done, 2 the user's mistake, 1 a failed stage or a bug, 130 interrupted."""
    signal.signal(signal.SIGTERM, _interrupt)  # from the first moment on, not only while a stage runs
    sys.exit(command(sys.argv[1:]))


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def command(words: list[str]) -> int:
    """Run one command line and return its exit code; anything that is neither the user's mistake nor a failed stage
    is a bug and comes out with its traceback."""
    try:
        return _command(words)
    except UserError as error:
        return _complain(error)
    except KeyboardInterrupt:
        continues = "; the same command continues with the stage that was cut" if words[:1] == ["run"] else ""
        print(f"interrupted{continues}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _command(words: list[str]) -> int:
    if completion := [word for word in words if word in COMPLETION]:
        words = _completed_words([completion[0], *filter(SHELLS.fullmatch, words)])
        if not words:
            return 0
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0
    if words[0] == "--version":
        print(f"lightning-llm {__version__}")
        return 0
    verb, rest = words[0], words[1:]
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        remedy = f"The nearest is {near[0]}" if near else f"Verbs are {', '.join(VERBS)}"
        raise UserError("lightning-llm", f"there is no verb {verb}", remedy)
    if "-h" in rest or "--help" in rest:
        print(usage_of(verb, _option(rest, "--config-dir", "-cd")))
        return 0
    if "--version" in rest:
        print(f"lightning-llm {__version__}")
        return 0
    return _hydra(verb, _arranged(verb, rest))


def _complain(error: UserError) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


# ---- Hydra ----


def _hydra(verb: str, words: list[str]) -> int:
    """Hand the words to Hydra. Its complaints come back as ours, and so does what the verb raises."""
    import hydra
    from hydra._internal.utils import get_args_parser

    from lightning_llm.pipeline.composition import CONF, build_loader, compose_tree
    from lightning_llm.pipeline.mistakes import as_user_error
    from lightning_llm.pipeline.runner import StageFailed
    from lightning_llm.pipeline.sweep import SweepFailed, use_checked_sweeper

    parser = get_args_parser()
    parser.error, parser.allow_abbrev = _refuse_flag, False
    flags = parser.parse_args(words)
    _refuse_flags(verb, flags)
    loader = build_loader(flags.config_dir)
    if flags.cfg == "job":
        _print_tree(_checked_tree(verb, flags, loader), flags)
        return 0
    if flags.cfg or flags.info:
        _checked_tree(verb, flags, loader)
    use_checked_sweeper()
    argv, kept = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = ["lightning-llm", *words]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises what it would print
    outcome: list[int | BaseException] = []
    try:
        hydra.main(config_path=str(CONF), config_name=verb, version_base="1.3")(_job(verb, outcome))()
    except SystemExit as end:  # after --hydra-help
        return int(end.code or 0)
    except SweepFailed as error:
        return 2 if error.is_users else 1
    except Exception as error:
        if mistake := as_user_error(error, verb, loader, flags.overrides):
            raise mistake from error
        if isinstance(error, ValueError | TypeError | AssertionError | AttributeError) and not flags.multirun:
            compose_tree(verb, flags.overrides, loader=loader)  # says what Hydra says in words of its own
        raise
    finally:
        sys.argv = argv
        os.environ.pop("HYDRA_FULL_ERROR")
        if kept is not None:
            os.environ["HYDRA_FULL_ERROR"] = kept
    for result in outcome:
        if isinstance(result, StageFailed):
            traceback.print_exception(result.__cause__)
            print(f"error: {result}", file=sys.stderr)
            return 1
        if isinstance(result, BaseException):
            raise result
    return max((result for result in outcome if isinstance(result, int)), default=0)


def _refuse_flag(message: str) -> NoReturn:
    raise UserError("command line", message, "See --help, and --hydra-help for all of Hydra's flags")


def _refuse_flags(verb: str, flags: Namespace) -> None:
    """Refuse those of Hydra's flags that mean nothing here, and those that mean nothing together."""
    for flag, value in (("--config-name", flags.config_name), ("--config-path", flags.config_path)):
        if value is not None:
            remedy = "Add a folder of your own YAML files with --config-dir, and choose among them with group=option"
            raise UserError(flag, f"cannot be changed: {verb} has its own", remedy)
    if flags.experimental_rerun is not None:
        remedy = "Type the same command again: stages that are finished are reused"
        raise UserError("--experimental-rerun", "is not for these verbs", remedy)
    for flag, value in (("--resolve", flags.resolve), ("--package", flags.package)):
        if value and not flags.cfg:
            raise UserError(flag, "means nothing without --cfg", f"Add --cfg job, or leave {flag} out")
    given = {"--run": flags.run, "--multirun": flags.multirun, "--cfg": flags.cfg, "--info": flags.info}
    given["--shell-completion"] = flags.shell_completion
    if len(several := [flag for flag, value in given.items() if value]) > 1:
        raise UserError("command line", f"{' and '.join(several)} cannot be given together", "Leave one out")


def _checked_tree(verb: str, flags: Namespace, loader: Any) -> Composition:
    """The composed tree; refuses an unknown key also where nothing runs, and a figure that is out of range."""
    from lightning_llm.pipeline.composition import compose_tree
    from lightning_llm.pipeline.reader import refuse_unknown_keys
    from lightning_llm.pipeline.recipe import build_recipe

    composition = compose_tree(verb, flags.overrides, loader=loader)
    refuse_unknown_keys(composition)
    if composition.recipe is not None:
        build_recipe(composition)
    return composition


def _print_tree(composition: Composition, flags: Namespace) -> None:
    """What `--cfg job` prints, as Hydra does, which would compose the tree once more: half of a second."""
    from omegaconf import OmegaConf

    from lightning_llm.pipeline.composition import select_package

    part = select_package(composition, flags.package) if flags.package else composition.config
    if not OmegaConf.is_config(part):
        print(part)
        return
    if flags.package not in (None, "_global_"):
        print(f"# @package {flags.package}")
    if flags.resolve:
        OmegaConf.resolve(part)
    print(OmegaConf.to_yaml(part), end="")


def _job(verb: str, outcome: list[int | BaseException]) -> Callable[[Any], Any]:
    """What Hydra calls with a composed tree: once, or for each job of a sweep."""

    def job(config: Any) -> Any:
        from hydra.core.global_hydra import GlobalHydra
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode

        from lightning_llm.pipeline.composition import job_composition

        verbs = {"run": _run, "plan": _plan, "report": _report, "store": _store, "generate": _generate, "chat": _chat}
        work = verbs[verb]
        if HydraConfig.get().mode == RunMode.MULTIRUN:  # the sweeper keeps the errors of the jobs apart
            return work(job_composition(verb, config, GlobalHydra.instance().config_loader()))[1]
        try:  # past Hydra, which would add lines of its own
            code, result = work(job_composition(verb, config, GlobalHydra.instance().config_loader()))
            outcome.append(code)
            return result
        except Exception as error:
            outcome.append(error)

    return job


# ---- verbs: (exit code, what they leave) ----


def _run(composition: Composition) -> tuple[int, str]:
    from lightning_llm.pipeline import run
    from lightning_llm.pipeline.reader import build_settings
    from lightning_llm.pipeline.recipe import build_recipe

    settings = build_settings(composition)
    recipe = build_recipe(composition, settings)
    from lightning_llm.report import report
    from lightning_llm.stages.gate import GateClosed

    try:
        folder = run(recipe, until=settings.until, only=settings.only, force=settings.force).folder
    except GateClosed as closed:
        if closed.folder is not None:  # what the gate has found is the end of this run's story
            report([closed.folder], closed.folder / "report.html")
            print(closed.folder, flush=True)
        raise
    report([folder], folder / "report.html")
    print(folder, flush=True)
    return 0, str(folder)


def _plan(composition: Composition) -> tuple[int, None]:
    from lightning_llm.pipeline import plan
    from lightning_llm.pipeline.reader import build_settings
    from lightning_llm.pipeline.recipe import build_recipe

    settings = build_settings(composition)
    if settings.format not in ("text", "json"):
        raise UserError("format", f"is {settings.format!r}", "Give text or json")
    chosen = plan(build_recipe(composition, settings)).selected(until=settings.until, only=settings.only)
    if settings.format == "json":
        import json

        print(json.dumps(chosen.to_json(), indent=2))
    else:
        print(chosen)
    return 0, None


def _report(composition: Composition) -> tuple[int, str]:
    from lightning_llm.pipeline.reader import build_settings
    from lightning_llm.report import report

    settings = build_settings(composition)
    page = report([Path(run) for run in settings.runs], Path(settings.output))
    print(page)
    return 0, str(page)


def _store(composition: Composition) -> tuple[int, None]:
    from lightning_llm.pipeline.reader import build_settings
    from lightning_llm.pipeline.store_report import list_store, remove_from_store, verify_store

    settings = build_settings(composition)
    actions = {"list": list_store, "verify": verify_store, "remove": remove_from_store}
    if settings.action not in actions:
        near = difflib.get_close_matches(settings.action, actions, n=1)
        remedy = f"The nearest is {near[0]}" if near else f"Give {', '.join(actions)}"
        raise UserError("store", f"cannot {settings.action}", remedy)
    return actions[settings.action](settings), None


def _generate(composition: Composition) -> tuple[int, None]:
    from lightning_llm.generation.output import write_replies
    from lightning_llm.generation.prompts import read_prompts
    from lightning_llm.pipeline.reader import build_settings

    settings = build_settings(composition)
    prompts = read_prompts(settings.prompt, settings.prompts)
    speaker = _speaker(settings)
    write_replies(
        speaker, prompts, template=settings.template, batch_size=settings.batch_size, output_format=settings.format
    )
    return 0, None


def _chat(composition: Composition) -> tuple[int, None]:
    from lightning_llm.generation.chat import chat
    from lightning_llm.pipeline.reader import build_settings

    chat(_speaker(build_settings(composition)))
    return 0, None


def _speaker(settings: Any) -> Any:
    """The model that a verb is to speak with."""
    from lightning_llm.generation.speaker import load_speaker
    from lightning_llm.pipeline.checks import check_compute
    from lightning_llm.pipeline.find_model import find_model
    from lightning_llm.pipeline.store import Store

    check_compute(settings.compute)
    if not settings.model.path:
        raise UserError("model", "is missing", "Give model=ARTIFACT, or a Hugging Face directory")
    model = find_model(
        settings.model.path, Store(settings.store.root), lambda text: print(f"note: {text}", file=sys.stderr)
    )
    return load_speaker(model, settings, settings.compute)


# ---- words ----


def _arranged(verb: str, words: list[str]) -> list[str]:
    """Flags first, as Hydra wants them; then overrides, among them `report A B` and `store remove A` spelt as such."""
    flags: list[str] = []
    overrides: list[str] = []
    plain: list[str] = []
    several: dict[str, list[str]] = {}
    takes_value = False
    words = [
        f"{word}=all" if word in ("--info", "-i") and after not in INFO else word
        for word, after in itertools.pairwise([*words, ""])
    ]
    for word in words:
        key, equals, value = word.partition("=")
        if takes_value or word.startswith("-"):
            flags.append(word)
        elif verb == "chat" and equals and key in ("prompt", "prompts"):
            remedy = "Say it when chat asks, or pipe it in, a line each; generate takes prompt=TEXT"
            raise UserError("command line", f"chat takes no {key}", remedy)
        elif verb in SPEAKING and equals and key in VERBATIM:
            overrides.append(f"{VERBATIM[key]}={_quoted(value)}")
        elif verb in SPEAKING and equals and key in SEVERAL:
            several.setdefault(key, []).append(_quoted(value))
        else:
            (overrides if "=" in word or word.startswith("~") or verb not in POSITIONAL else plain).append(word)
        takes_value = not takes_value and word in (*VALUED_FLAGS, "--info", "-i")
    if takes_value:  # otherwise the first override would be taken for it
        raise UserError(words[-1], "has no value", f"Give one behind {words[-1]}")
    if verb == "store" and plain:
        overrides.append(f"action={_quoted(plain.pop(0))}")
    if plain:
        overrides.append(f"{POSITIONAL[verb]}=[{','.join(map(_quoted, plain))}]")
    overrides += [f"{key}=[{','.join(values)}]" for key, values in several.items()]
    return flags + overrides


def _quoted(word: str) -> str:
    """A word as a string of Hydra's grammar: backslashes count only before a quote, and `${` would be a reference."""
    word = re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + "\\${", word)
    return "'" + re.sub(r"(\\*)('|\Z)", lambda found: found[1] * 2 + found[2].replace("'", "\\'"), word) + "'"


def _completed_words(words: list[str]) -> list[str]:
    """The words of a completion request with the verb in front, which Hydra does not know of; none: answered."""
    if len(words) != 2:
        raise UserError(words[0], "names no shell", f"Give install=bash (or fish, zsh) behind {words[0]}")
    if any(word.startswith("query=") for word in words) and "COMP_LINE" not in os.environ:
        raise UserError(words[0], "query= is what a shell asks", f"Set completion up with {words[0]} install=bash")
    if "query=bash" not in words:
        return ["run", *words]
    program, _, rest = os.environ["COMP_LINE"].partition(" ")
    verb, space, rest = rest.lstrip().partition(" ")
    if not space or verb not in VERBS:
        print(" ".join(VERBS))
        return []
    begun = rest.rpartition(" ")[2]
    if verb in SPEAKING and begun.startswith(("model=", "prompts=")):  # paths, where Hydra would offer conf/model/
        key, _, path = begun.partition("=")
        found = (f"{key}={path}" for path in sorted(glob.glob(f"{glob.escape(path)}*")))
        print(" ".join(f"{word}/" if Path(word.partition("=")[2]).is_dir() else word for word in found))
        return []
    os.environ["COMP_LINE"] = f"{program} {rest}"
    return [verb, *words]


# ---- help ----


def usage() -> str:
    """What --help prints."""
    verbs = "\n".join(f"  {verb:<8}{words:<34}{what}" for verb, (words, what) in VERBS.items())
    return (
        f"lightning-llm {__version__}: published LLM training recipes as programs\n\n"
        f"lightning-llm VERB [key=value ...]\n\n{verbs}\n\n{EXAMPLES}\n\n{FLAGS}\n\n"
        "lightning-llm VERB --help lists what can be chosen."
    )


def usage_of(verb: str, config_dir: str | None) -> str:
    """What VERB --help prints: what it takes, and the options of every group, the user's own among them."""
    words, what = VERBS[verb]
    head = f"lightning-llm {verb} {words} [key=value ...]: {what}"
    if verb in SPEAKING:
        return f"{head}\n\n{SPEECH}\n\n{FLAGS}"
    if verb in ("report", "store"):
        return f"{head}\n\n{FLAGS}"
    package = Path(__file__).parent
    shipped = next(path for path in (package.parent / "conf", package / "conf") if (path / "base.yaml").is_file())
    options: dict[str, set[str]] = {}
    for folder in (shipped, *([Path(config_dir)] if config_dir else [])):
        for path in folder.glob("*/*.yaml"):
            options.setdefault(path.parent.name, set()).add(path.stem)
    groups = "\n".join(f"  {group:<12}{', '.join(sorted(names))}" for group, names in sorted(options.items()))
    return (
        f"{head}\n\ngroups (group=option; in a stage group@stages.NAME.group=option):\n{groups}\n\n"
        f"any setting: key=value, as --cfg job prints them\n\n{EXAMPLES}\n\n{FLAGS}"
    )


def _option(words: list[str], *names: str) -> str | None:
    """The value of a flag, given as `--flag value` or `--flag=value`."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word in names:
            return following
        for name in names:
            if word.startswith(f"{name}="):
                return word.partition("=")[2]
    return None


if __name__ == "__main__":
    main()

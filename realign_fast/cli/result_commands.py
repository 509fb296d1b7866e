"""The commands `verify` and `report`, and the report at the end of another command."""

from __future__ import annotations

import warnings

from . import options as opts
from .app import ExitCode, Result, command


@command("Results", "OUT", "s3://bucket/aligned --json")
def verify(options: opts.Common, out: opts.Result) -> Result:
    """Read a result again and compare it with its manifest."""
    from ..pipeline.verify import verify

    checked, faults = verify(out)
    counts = ", ".join(f"{count:,} {name}" for name, count in checked.items())
    summary = f"{out}: {counts} checked, {len(faults)} faults"
    status = ExitCode.FAULTS if faults else ExitCode.DONE
    facts = {"out": out, "checked": checked, "faults": faults}
    return Result(facts, "\n".join([*faults, summary]), status, answer=True)


@command("Results", "OUT", "OUT --sample 10000")
def report(
    options: opts.Common, out: opts.Result, sample: opts.Sample = 3000, seed: opts.SampleSeed = 0
) -> Result:
    """Write a page that shows what a run changed, and whether to trust its result."""
    from ..report import write_report

    path, facts = write_report(out, sample, seed)
    lines = [facts["sentence"], facts["trust"]["verdict"]]
    lines += [f"  {finding['rule']}: {finding['text']}" for finding in facts["trust"]["findings"]]
    summary = {name: facts[name] for name in ("sentence", "trust")}
    return Result(
        {"report": str(path), **summary}, "\n".join([*lines, f"wrote {path}"]), answer=True
    )


def with_report(result: Result, out: str, options: opts.Common, is_asked: bool) -> Result:
    """Return the result of a run, with the report on its output if that is asked for."""
    if not is_asked:
        return result
    try:
        page = report(options, out)
    except Exception as error:  # the run itself ended well: its lines and status stay
        warnings.warn(
            f"the run ended, its report failed ({error}); try: realign-fast report {out}",
            stacklevel=2,
        )
        return result
    facts = {**result.facts, "page": page.facts}
    return result._replace(facts=facts, text=f"{result.text}\n{page.text}")

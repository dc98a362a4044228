"""Output on the terminal: labelled lines, a progress bar, answers next to each other."""

import datetime
import pathlib
import shlex
import shutil
import sys
import textwrap
import time
import typing
from collections.abc import Iterable, Mapping, Sequence

from lora_jax.parallel import processes

if typing.TYPE_CHECKING:
    import tqdm

LABEL = 10  # columns
_SCRIPTS = {"inspect": "inspect_data"}  # verbs whose script has another name
PLAIN_LINES = 20  # of progress in all, if there is no terminal for a bar


def width() -> int:
    """The columns of a line of text on this terminal: at least 40, at most 100."""
    return max(40, min(shutil.get_terminal_size().columns, 100))


def say(label: str, text: str) -> None:
    """Prints `label     text`, wrapped to the width of the terminal."""
    import tqdm  # imported late, to keep --help fast

    # Above the progress bar, if there is one.
    tqdm.tqdm.write(labelled(label, text))
    sys.stdout.flush()


def labelled(label: str, text: str) -> str:
    """`label     text`, wrapped to the width of the terminal."""
    lines = textwrap.wrap(
        text, width(), initial_indent=f"{label:<{LABEL}}", subsequent_indent=" " * LABEL,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
    return "\n".join(lines)


def pairs(settings: Mapping[str, object]) -> str:
    """The settings as "name value, name value"."""
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def command(verb: str) -> str:
    """The command line of another verb, in the form in which this program was started."""
    started = pathlib.PurePath(sys.argv[0])
    if started.name.startswith("lora-jax"):
        return f"lora-jax {verb}"
    python = near(sys.executable)
    python = "python" if python == sys.executable else python
    if started.parent.name == "scripts":
        return f"{python} scripts/{_SCRIPTS.get(verb, verb)}.py"
    return f"{python} -m lora_jax {verb}"


def near(path: str) -> str:
    """`path` relative to the current folder if it is inside, else unchanged."""
    here = pathlib.Path.cwd()
    return str(pathlib.Path(path).relative_to(here)) if path.startswith(f"{here}/") else path


def quoted(text: str) -> str:
    """`text` quoted for a shell, on one line."""
    if "\n" not in text:
        return shlex.quote(text)
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"$'{escaped}'"


def count(number: int) -> str:
    """A number such as 6.74 B."""
    for unit, power in ((" B", 1e9), (" M", 1e6), (" k", 1e3)):
        if number >= power:
            return f"{number / power:.3g}{unit}"
    return str(number)


def size(num_bytes: float) -> str:
    """A size such as 3.87 GB (powers of ten)."""
    for unit, power in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= power:
            return f"{num_bytes / power:.3g} {unit}"
    return f"{num_bytes} B"


def mixture(
    names: Sequence[str], shares: Sequence[float], sizes: Sequence[int] | None, shown: int
) -> str:
    """The share of each source in `shown` sequences, and how often its sequences are repeated."""
    parts = [f"{share:.1%} of {near(name)}" for name, share in zip(names, shares, strict=True)]
    if sizes is not None:
        seen = [shown * share / size for share, size in zip(shares, sizes, strict=True)]
        parts = [f"{part}, seen {n:.2g} times" for part, n in zip(parts, seen, strict=True)]
    return f"{shown} sequences: " + "; ".join(parts)


def remat(chosen: str, needs: Mapping[str, int], limit: int) -> str:
    """The policy that --remat auto has chosen, and the memory that the others would need."""
    others = ", ".join(f"{name} {size(need)}" for name, need in needs.items() if name != chosen)
    text = f"{chosen}: {size(needs[chosen])} of {size(limit)} planned"
    return f"{text}; {others}" if others else text


def bar(total: int, first: int, unit: str) -> "tqdm.tqdm":
    """A bar on stderr, if that is a terminal, of `total` things of which `first` are done."""
    import tqdm

    hidden = not sys.stderr.isatty() or not processes.leads()
    return tqdm.tqdm(total=total, initial=first, unit=unit, disable=hidden, dynamic_ncols=True)


def tracked(steps: Iterable[typing.Any], total: int, unit: str) -> Iterable[typing.Any]:
    """The steps, with a bar on stderr if that is a terminal, which goes at the end."""
    import tqdm

    return tqdm.tqdm(steps, total=total, unit=unit, leave=False, disable=not sys.stderr.isatty())


class Progress:
    """A progress bar with time left, loss, tokens/s, and MFU and memory if they are known.

    Without a terminal: a line every `every` steps, by default about 20 lines in all.
    """

    def __init__(self, first: int, num_steps: int, every: int | None):
        import tqdm

        self._every = every or max(1, num_steps // PLAIN_LINES)

        self._num_steps = num_steps
        self._since: tuple[int, float] | None = (
            None  # (step, time) after the first step, which compiles
        )
        self._plain = not sys.stderr.isatty() or not processes.leads()
        self._bar = tqdm.tqdm(
            total=num_steps, initial=first, unit="step", disable=self._plain, dynamic_ncols=True,
            bar_format="{n_fmt}/{total_fmt}|{bar}| {remaining} left{postfix}",  # fits 80 columns
        )  # fmt: skip

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        shown = f"loss {metrics['loss']:.3f}, {metrics['tokens_per_second']:,.0f} tokens/s"
        if "mfu" in metrics:
            shown += f", MFU {metrics['mfu']:.0%}"
        if "peak_bytes" in metrics:
            shown += f", {size(metrics['peak_bytes'])}"
        self._bar.set_postfix_str(shown, refresh=False)
        self._bar.update(step - self._bar.n)
        if self._plain and (step % self._every == 0 or step in (1, self._num_steps)):
            if self._since:
                a_step = (time.time() - self._since[1]) / (step - self._since[0])
                left = datetime.timedelta(seconds=round(a_step * (self._num_steps - step)))
                shown += f", {left} left"
            say("train", f"step {step} of {self._num_steps}: {shown}")
        self._since = self._since or (step, time.time())


def side_by_side(before: list[dict[str, str]], after: list[dict[str, str]]) -> None:
    """Prints each prompt with the answers before and after training next to each other."""
    width = max(60, min(shutil.get_terminal_size().columns, 120))
    column = (width - 3) // 2
    for old, new in zip(before, after, strict=False):
        print("\n" + textwrap.fill(old["prompt"].strip(), width))
        print(f"{'before':<{column}} | after" + ("  ✓" if is_right(new) else "  ✗"))
        left, right = (textwrap.wrap(a["text"].strip(), column) for a in (old, new))
        for row in range(max(len(left), len(right))):
            cells = [cell[row] if row < len(cell) else "" for cell in (left, right)]
            print(f"{cells[0]:<{column}} | {cells[1]}")
    print()


def is_right(answer: Mapping[str, str]) -> bool:
    """Whether an answer is the expected one, apart from surrounding whitespace."""
    return answer["text"].strip() == answer["expected"].strip()

"""Make the picture in README.md: the script at a terminal, recorded, as an SVG that moves.

    python tests/make_picture.py

It is a real run on the model that ships, but each token takes 70 ms, as those of a large model do:
it would write a thousand a second. Loading takes as long as it does.
"""

import html
import os
import pty
import sys
import time

from families import FUNCTION, ROOT
from programs import read_terminal

TOKEN = 0.07
COLUMNS = 84
SLOWLY = f"""
import sys, time
import multinomial_causal_lm

write = multinomial_causal_lm.IterableStreamer.write


def write_slowly(streamer, token):
    time.sleep({TOKEN})
    return write(streamer, token)


multinomial_causal_lm.IterableStreamer.write = write_slowly
multinomial_causal_lm.main()
"""
PROMPT = f'$ python multinomial_causal_lm.py tests/models/tiny-llama "{FUNCTION}"'
STYLE = """
text { font: 14px ui-monospace, Menlo, Consolas, monospace; fill: #d6deeb; white-space: pre }
tspan { fill-opacity: 0; animation: appear 1ms forwards }
@keyframes appear { to { fill-opacity: 1 } }
@media (prefers-reduced-motion) { tspan { fill-opacity: 1; animation: none } }
"""


def record() -> list[tuple[float, str]]:
    """Return what comes on the terminal, with the seconds from the beginning."""
    process, terminal = pty.fork()
    if not process:
        os.chdir(ROOT)
        command = [sys.executable, "-c", SLOWLY, "tests/models/tiny-llama", FUNCTION]
        os.execv(sys.executable, command)
    parts, start = [], time.monotonic()
    for part in read_terminal(terminal):
        parts.append((time.monotonic() - start, part.decode().replace("\r", "")))
    return parts


def draw(parts: list[tuple[float, str]]) -> str:
    rows = [[(0.0, PROMPT[:COLUMNS])], [(0.0, PROMPT[COLUMNS:])], []]
    for when, text in parts:
        first, *others = text.split("\n")
        rows[-1].append((when + 1, first))  # A second to read the command.
        rows += [[(when + 1, line)] for line in others]
    lines = []
    for number, row in enumerate(rows[:-2]):  # The last one has the speed without the delay.
        spans = "".join(
            f'<tspan style="animation-delay:{when:.2f}s">{html.escape(text)}</tspan>'
            for when, text in row
            if text
        )
        lines.append(f'<text x="16" y="{30 + 20 * number}" xml:space="preserve">{spans}</text>')
    height = 20 * len(rows)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 740 {height}" width="740">',
            f"<style>{STYLE}</style>",
            '<rect width="100%" height="100%" rx="8" fill="#10172a"/>',
            *lines,
            "</svg>\n",
        ]
    )


def main() -> None:
    picture = draw(record())
    (ROOT / ".github" / "streaming.svg").write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()

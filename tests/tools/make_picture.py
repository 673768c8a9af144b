"""Draw docs/images/demo.svg from a demo's evaluation: `python tests/tools/make_picture.py runs/demo`."""

import json
import sys
from pathlib import Path

from fledge.eval.figures.plots import ACCENT, INK, MUTED, plotting
from fledge.eval.figures.records import LOOKUP, TRAINED, UNTRAINED

PICTURE = Path(__file__).parents[2] / "docs" / "images" / "demo.svg"


def draw(results: dict, path: Path) -> None:
    """Draw acceptance by position, and tokens/s of every drafter."""
    with plotting() as plt:
        plt.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "demo", "font.family": "sans-serif"}
        figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 2.7), width_ratios=(3, 2))
        rates = {name: counts["acceptance_rate_per_pos"] for name, counts in results["baselines"].items()}
        shown = {TRAINED: (results["acceptance_rate_per_pos"], ACCENT), LOOKUP: (rates[LOOKUP], MUTED)}
        for number, (name, (values, color)) in enumerate(shown.items()):
            places = [position + (number - 0.5) * 0.38 for position in range(1, len(values) + 1)]
            bars = left.bar(places, values, 0.36, color=color, label=name)
            left.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
        left.set(xlabel="draft position", ylabel="accepted, share of rounds", xticks=range(1, len(values) + 1))
        left.set_ylim(0, 1.05)
        left.legend(frameon=False, fontsize=8, loc="upper right")
        left.set_title(f"acceptance length {results['acceptance_length']:.2f}", loc="left", color=INK)
        speeds = {UNTRAINED: results["baselines"][UNTRAINED]["tokens_per_s"]}
        speeds |= {LOOKUP: results["baselines"][LOOKUP]["tokens_per_s"]}
        speeds |= {"verifier alone": results["verifier_alone_tokens_per_s"], TRAINED: results["tokens_per_s"]}
        colors = [ACCENT if name == TRAINED else MUTED for name in speeds]
        bars = right.barh(list(speeds), list(speeds.values()), color=colors)
        right.bar_label(bars, fmt="%.0f", fontsize=8, padding=3)
        right.set(xlabel="tokens/s", xlim=(0, 1.15 * max(speeds.values())))
        right.set_title(f"{results['speedup']:.2f} times as fast", loc="left", color=INK)
        figure.tight_layout(w_pad=3)
        figure.savefig(path, metadata={"Date": None}, facecolor="white")
        plt.close(figure)


if __name__ == "__main__":
    draw(json.loads((Path(sys.argv[1]) / "evaluation" / "acceptance.json").read_text()), PICTURE)

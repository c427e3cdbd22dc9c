"""Draw the picture of the README from the measured figures.

usage: python docs/images/draw.py
"""

import csv
from pathlib import Path
from statistics import mean

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parents[2]
ROWS = {  # of the file -> of the picture, from the top
    "no auxiliaries": "no auxiliaries",
    "no auxiliaries, as many images": "no auxiliaries,\nas many images seen",
    "random auxiliaries": "random auxiliaries",
    "neighbours, silenced (0.1)": "neighbours, silenced",
}
COLUMNS = {"top1": "all 20 classes", "few": "classes with few images"}
COLOURS = ("#9aa5b1", "#6b7a8c", "#7d92d8", "#3557c4")


def main() -> None:
    """Write siblings.svg beside this file."""
    file = ROOT / "benchmarks/results/siblings-cpu.csv"
    with file.open(newline="", encoding="utf-8") as rows:
        measured = list(csv.DictReader(rows))
    plt.rcParams.update({"font.size": 11, "svg.hashsalt": "fastlt", "svg.fonttype": "path"})
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 2.6), sharey=True, layout="constrained")
    for axis, (column, title) in zip(axes, COLUMNS.items(), strict=True):
        for place, name in enumerate(ROWS):
            values = [float(row[column]) for row in measured if row["control"] == name]
            axis.barh(place, mean(values), 0.62, color=COLOURS[place])
            axis.plot(values, [place] * len(values), "o", color="black", markersize=3.5)
            axis.text(1, place, f"{mean(values):.1f}", va="center", color="white", weight="bold")
        axis.set_title(title, fontsize=11, loc="left")
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
        axis.set_xlim(0, 60)
    axes[0].set_yticks(range(len(ROWS)), ROWS.values())
    axes[0].invert_yaxis()
    figure.supxlabel(
        "top-1 on the test images, percent; a dot for each of three seeds", fontsize=10
    )
    figure.savefig(Path(__file__).with_name("siblings.svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()

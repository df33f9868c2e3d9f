"""evaluate.py --frontier: accuracy against calls for several models, as a plot and a table."""

from textwrap import fill

from evaluation import plots
from evaluation.metrics import area, aup
from evaluation.outputs import write_rows
from evaluation.paired import area_difference_table
from evaluation.tables import (
    AUP_EXPLAINED,
    NAME_WIDTH,
    WIDTH,
    conditions,
    curves_of,
    print_columns,
    print_differences,
    shorten_name,
)


def show_frontiers(rows, folder):
    """Draws the frontiers, adds area and AUP to the rows, and prints a table."""
    largest_nfe = max(row["nfe"] for row in rows)
    best = max(row["solved"] for row in rows)
    frontiers = []  # curves with more than one point
    labels = []
    table = [["", "decoder", "points", "area", "AUP", "best", "its NFE"]]
    for (name, rule), curve in curves_of(rows).items():
        curve_area = area(curve, largest_nfe)
        curve_aup = aup(curve, best)
        for row in curve:
            row["area"] = curve_area
            row["aup"] = curve_aup
        if len(curve) > 1:
            frontiers.append(curve)
            labels.append(f"{shorten_name(name, NAME_WIDTH)} {rule}")
        best_row = max(curve, key=lambda row: row["solved"])
        table.append(
            [
                shorten_name(name, NAME_WIDTH),
                rule,
                str(len(curve)),
                f"{curve_area:.3f}",
                f"{curve_aup:.1f}",
                f"{best_row['solved']:.1%}",
                f"{best_row['nfe']:.2f}",
            ]
        )
    picture = folder / "frontiers.png"
    rows_file = folder / "frontiers.jsonl"
    write_rows(rows, rows_file)  # first, since measuring them may have taken hours
    plots.plot_frontier(rows, picture, title=f"{rows[0]['task']}: accuracy against calls")
    print(fill(conditions(rows), WIDTH))
    print_columns(table)
    area_explained = f"area: mean accuracy over budgets of 1 to {largest_nfe:.2f} calls."
    print(fill(f"{area_explained} {AUP_EXPLAINED}", WIDTH))
    if frontiers:
        print_differences(area_difference_table(frontiers, labels, largest_nfe))
    print("written:", picture, rows_file)

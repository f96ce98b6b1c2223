"""A comparison of runs as one HTML page that needs nothing else: no network, no script."""

import base64
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from html import escape

import lowssl_core
from lowssl_core.comparison.charts import (
    RUN_DASHES,
    Chart,
    color_of,
    css_name,
    loss_charts,
    quality_charts,
)
from lowssl_core.comparison.notes import common_images, loss_note, notes
from lowssl_core.comparison.run_folder import ComparedRun
from lowssl_core.comparison.runs import Comparison
from lowssl_core.comparison.style import style
from lowssl_core.comparison.tables import (
    Cell,
    Table,
    differences_table,
    evaluation_tables,
    results_table,
    summary_table,
)
from lowssl_core.comparison.views import geometry_charts, picture, scale_chart, views_groups
from lowssl_core.sources import Source

_WORDS_ON_SCALES = (
    "Lines: 90 % of sampled boxes; bars: half of them; circles: means. Where views are matched, global and local "
    "bars lie alike."
)
_WORDS_ON_GEOMETRY = (
    "Below, one draw of views. Runs do not record their images: the square stands for one of the data's mean area, and "
    "its lines show how much each view enlarges it. With --data PATH, lowssl compare draws the views of an image."
)


def page(comparison: Comparison, source: Source | None = None) -> str:
    """The page; with `source`, views are shown on one of its images.

    Raises:
        UserError: not one image of `source` can be read.
    """
    runs = comparison.runs
    title = f"{len(runs)} runs compared" if len(runs) > 1 else f"Run {runs[0].name}"
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    parts = [
        f"<h1>{escape(title)}</h1>",
        _cards(runs),
        *_notes(comparison),
        *_results(comparison),
        *_curves(comparison),
        *_differences(comparison),
        _section("Runs", _table(summary_table(comparison), runs)),
        *_views(comparison, source),
        *_warnings(runs),
        f"<footer>Made by lowssl {lowssl_core.__version__} on {made}, from what each run's folder held then.</footer>",
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(', '.join(run.name for run in runs))} - lowssl compare</title>\n"
        f"<style>{style()}</style>\n</head>\n<body>\n<main>\n{''.join(parts)}\n</main>\n</body>\n</html>\n"
    )


def _section(title: str, *content: str) -> str:
    return f"\n<section>\n<h2>{escape(title)}</h2>\n{''.join(content)}</section>"


def _key(run: ComparedRun) -> str:
    return f'<span class="key" style="{_color(run)}">{run.key}</span>'


def _color(run: ComparedRun) -> str:
    return f"--c: var({css_name(color_of(run))})"


def _cards(runs: Sequence[ComparedRun]) -> str:
    cards = []
    for run in runs:
        names = dict.fromkeys(str(row.get("name")) for row in run.warnings if run.state != "failed")
        warned = f'<span class="state failed">warned of {escape(", ".join(names))}</span>' if names else ""
        what = f"{run.recipe.method.name} on {run.recipe.backbone.name}, seed {run.recipe.seed}" if run.recipe else ""
        cards.append(
            f'<li class="card" style="{_color(run)}">{_key(run)}<b>{escape(run.name)}</b>'
            f'<div class="quiet">{escape(what)}</div><span class="state {run.state}">{escape(run.status)}</span>'
            f"{warned}</li>"
        )
    return f'<ul class="cards">{"".join(cards)}</ul>'


def _notes(comparison: Comparison) -> Iterable[str]:
    found = notes(comparison)
    for level, label in (("warning", "Warnings"), ("note", "Notes")):
        if texts := [note.text for note in found if note.level == level]:
            items = "".join(f"<li>{escape(text)}</li>" for text in texts)
            yield f'<aside class="note {level}" aria-label="{label}"><ul>{items}</ul></aside>'


def _results(comparison: Comparison) -> Iterable[str]:
    runs = comparison.runs
    content = [results_table(comparison)]
    if (common := common_images(comparison)) is not None:
        content.append(results_table(comparison, common))
    tables = [_table(table, runs, titled=index > 0) for index, table in enumerate(content) if table]
    yield _section("Results", *(tables or ['<p class="quiet">No quality has been measured yet.</p>']))
    for table in evaluation_tables(comparison):
        yield _section(table.title, _table(table, runs))


def _curves(comparison: Comparison) -> Iterable[str]:
    legend, losses, quality = _legend(comparison.runs), loss_charts(comparison), quality_charts(comparison)
    if quality:
        words = "Each line begins at the untrained network. Dotted: raw pixels. Diamonds: the teacher, at the end."
        yield _section("Quality over time", legend, _charts(quality), f'<p class="quiet">{words}</p>')
    note = f'<p class="quiet">{escape(text)}</p>' if (text := loss_note(comparison)) else ""
    if losses:
        yield _section("Losses", legend, _charts(losses), note)
    else:
        yield _section("Losses", '<p class="quiet">No step has been recorded yet.</p>')


def _differences(comparison: Comparison) -> Iterable[str]:
    if table := differences_table(comparison):
        yield _section(table.title, _table(table, comparison.runs) if table.rows else _lines(table.notes))


def _views(comparison: Comparison, source: Source | None) -> Iterable[str]:
    groups = views_groups(comparison)
    content = []
    if groups:
        content += [_charts([scale_chart(groups)], "wide"), f'<p class="quiet">{_WORDS_ON_SCALES}</p>']
        if source is None:
            content.append(f'<p class="quiet">{_WORDS_ON_GEOMETRY}</p>')
    for group in groups if source is None else views_groups(comparison, with_colors=True):
        keys = "".join(_key(run) for run in group)
        names = ", ".join(run.name for run in group)
        content.append(f"<h3>{keys}{escape(names)}</h3>")
        content.append(_charts(geometry_charts(group[0]), "pair") if source is None else _picture(group, source))
    if unknown := [run.name for run in comparison.runs if not (run.recipe and run.views)]:
        content.append(f'<p class="quiet">Not known before the first checkpoint: {escape(", ".join(unknown))}.</p>')
    yield _section("Views", *content)


def _picture(group: Sequence[ComparedRun], source: Source) -> str:
    data = base64.b64encode(picture(group[0], source)).decode()
    names = ", ".join(run.key for run in group)
    others = [run.key for run in group if run.data != source.description]
    more = f"; {', '.join(others)} trained on other data" if others else ""
    words = f"An image of {source.description}{more}."
    alt = f"{names}: an image with the boxes of its views, the views at true relative size, and the ratio of scales"
    return (
        f'<figure><div class="picture" tabindex="0"><img alt="{escape(alt)}" src="data:image/png;base64,{data}"></div>'
        f'<figcaption class="quiet">{escape(words)}</figcaption></figure>'
    )


def _warnings(runs: Sequence[ComparedRun]) -> Iterable[str]:
    rows = [
        (
            f"{run.key} {run.name}",
            [Cell(f"{row['step']:,}"), *(Cell(str(row.get(name, "-"))) for name in ("name", "message"))],
        )
        for run in runs
        for row in run.warnings
    ]
    if rows:
        columns = [("", "step"), ("", "warning"), ("", "in words")]
        yield _section("Warnings in full", _table(Table(title="Warnings", columns=columns, rows=rows), runs, "texts"))


def _legend(runs: Sequence[ComparedRun]) -> str:
    items = []
    for run in runs:
        dash = RUN_DASHES[(ord(run.key) - ord("A")) % len(RUN_DASHES)]
        pattern = (
            "" if isinstance(dash, str) else f' stroke-dasharray="{" ".join(f"{1.7 * each:g}" for each in dash[1])}"'
        )
        line = f'<path d="M0 5H30" style="stroke: var({css_name(color_of(run))})" stroke-width="2.2"{pattern} />'
        items.append(f'<li><svg viewBox="0 0 30 10" aria-hidden="true">{line}</svg>{_key(run)}{escape(run.name)}</li>')
    return f'<ul class="legend">{"".join(items)}</ul>'


def _charts(charts: Iterable[Chart], kind: str = "") -> str:
    figures = (
        f'<figure class="chart"><figcaption>{escape(chart.title)}</figcaption>'
        f'<div role="img" aria-label="{escape(chart.alt)}">{chart.svg}</div></figure>'
        for chart in charts
    )
    return f'<div class="charts {kind}">{"".join(figures)}</div>'


def _table(table: Table, runs: Sequence[ComparedRun], kind: str = "", *, titled: bool = False) -> str:
    kind = kind or ("texts" if table.runs_in == "columns" else "figures")
    heading = f"<h3>{escape(table.title)}</h3>" if titled else ""
    body = "".join(
        f'<tr><th scope="row">{_head(head, runs) if table.runs_in == "rows" else escape(head)}</th>'
        f"{''.join(_cell(cell) for cell in cells)}</tr>"
        for head, cells in table.rows
    )
    return (
        f'{heading}<div class="scroll" tabindex="0" role="region" aria-label="{escape(table.title)}">'
        f'<table class="{kind}"><caption class="unseen">{escape(table.title)}</caption>'
        f"<thead>{_table_head(table, runs)}</thead><tbody>{body}</tbody></table></div>{_lines(table.notes)}"
    )


def _table_head(table: Table, runs: Sequence[ComparedRun]) -> str:
    names = [_head(name, runs) if table.runs_in == "columns" else escape(name) for _, name in table.columns]
    heads = "".join(f'<th scope="col">{name}</th>' for name in names)
    if not any(group for group, _ in table.columns):
        return f"<tr><td></td>{heads}</tr>"
    groups = ""
    for group in dict.fromkeys(group for group, _ in table.columns):
        width = sum(each == group for each, _ in table.columns)
        groups += f'<th class="group" scope="colgroup" colspan="{width}">{escape(group)}</th>' if group else "<td></td>"
    return f'<tr><td rowspan="2"></td>{groups}</tr><tr>{heads}</tr>'


def _head(text: str, runs: Sequence[ComparedRun]) -> str:
    """A head that begins with a run's letter, with the run's name where nothing else follows."""
    key, _, rest = text.partition(" ")
    run = next(run for run in runs if run.key == key)
    return f"{_key(run)}{escape(rest or run.name)}"


def _cell(cell: Cell) -> str:
    kind = "faint" if cell.text in ("-", "absent") and not cell.mark else cell.mark
    words = f'<span class="unseen"> ({cell.mark})</span>' if cell.mark else ""
    return f'<td class="{kind}">{escape(cell.text)}{words}</td>' if kind else f"<td>{escape(cell.text)}</td>"


def _lines(lines: Iterable[str]) -> str:
    return "".join(f'<p class="quiet">{escape(line)}</p>' for line in lines)

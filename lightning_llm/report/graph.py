"""The drawn graph of a run's stages: a column per stage of the recipe, what feeds it above and its test below."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from html import escape

from lightning_llm.report.numbers import duration, quantity
from lightning_llm.report.record import Node, Run
from lightning_llm.stages.config import INSERTED

LABELS = {
    "prepare": "data",
    "score": "scores",
    "train": "training",
    "merge": "merging",
    "prune": "pruning",
    "upcycle": "upcycling",
    "evaluate": "evaluation",
    "gate": "gate",
    "generate": "sampling",
    "judge": "judging",
    "select": "selection",
}  # of kinds, in the legend
MADE_FROM = {  # kind -> roles of the models that it works on
    "train": ["starts_from", "teacher_model"],
    "generate": ["model"],
    "merge": ["starts_from", "model"],
    "prune": ["starts_from"],
    "upcycle": ["starts_from"],
}
Place = tuple[int, int]  # column along the flow, row across it


@dataclass(frozen=True)
class Paper:
    """Sizes of a drawing: `u` runs along the flow, `v` across it."""

    sideways: bool  # the flow runs to the right; otherwise downwards, for narrow screens
    width: float  # of a box
    height: float
    gap_u: float
    gap_v: float
    margin: float = 26  # room for the lines around the boxes

    @property
    def box(self) -> tuple[float, float]:
        """(along the flow, across it) of a box."""
        return (self.width, self.height) if self.sideways else (self.height, self.width)

    def corner(self, place: Place, first_row: int) -> tuple[float, float]:
        """(u, v) of a box's first corner; `first_row` is the row that lies at the margin."""
        (box_u, box_v), (column, row) = self.box, place
        return self.margin + column * (box_u + self.gap_u), self.margin + (row - first_row) * (box_v + self.gap_v)

    def point(self, u: float, v: float) -> str:
        """A place on the paper as an SVG path has it: x, then y."""
        x, y = (u, v) if self.sideways else (v, u)
        return f"{x:g} {y:g}"


WIDE = Paper(sideways=True, width=166, height=48, gap_u=38, gap_v=26)
NARROW = Paper(sideways=False, width=106, height=44, gap_u=30, gap_v=12, margin=18)


def draw_graph(run: Run, anchor: str = "stage-") -> str:
    """The graph twice as SVG, for wide and for narrow screens; each box links to the row of its stage in the table."""
    places, edges = lay_out(run.nodes), visible_edges(run.nodes)
    drawings = [
        f'<div class="graph {name}">{_draw(run.nodes, places, edges, paper, anchor, name)}</div>'
        for name, paper in (("wide", WIDE), ("narrow", NARROW))
    ]
    kinds = dict.fromkeys(node.kind for node in run.nodes)
    legend = "".join(f'<span class="key kind-{escape(kind)}">{escape(LABELS.get(kind, kind))}</span>' for kind in kinds)
    if any(node.reused for node in run.nodes):
        legend += '<span class="key is-reused">reused</span>'
    if run.missing:
        legend += '<span class="key is-missing">not made</span>'
    return f'{"".join(drawings)}<p class="legend">{legend}</p>'


def visible_edges(nodes: list[Node]) -> list[tuple[str, str]]:
    """Edges worth a line: what follows from others is left out, but never a model."""
    inputs = {node.name: dict.fromkeys(node.inputs.values()) for node in nodes}
    before: dict[str, set[str]] = defaultdict(set)  # all that lies before a node
    for node in nodes:
        for source in inputs[node.name]:
            before[node.name] |= {source} | before[source]
    edges = []
    for node in nodes:
        for source in inputs[node.name]:
            implied = any(source in before[other] for other in inputs[node.name])
            if not implied or source in _models(node):
                edges.append((source, node.name))
    return edges


def _models(node: Node) -> set[str]:
    """The models that a stage starts from, samples, merges, prunes or upcycles."""
    wanted = MADE_FROM.get(node.kind, [])
    return {source for role, source in node.inputs.items() if role.partition(".")[0] in wanted}


def lay_out(nodes: list[Node]) -> dict[str, Place]:
    """Column and row of each node.

    A stage of the recipe and the nodes made for it (`sft`, `sft.prepare`, `sft.evaluate`) share a column: the stage in
    row 0, what feeds it above, what follows below. Data that several stages share come first, in column 0.
    """
    groups = _groups(nodes)
    group_of = {node.name: head for head, members in groups.items() for node in members}
    shared = [head for head, members in groups.items() if all(node.kind == "prepare" for node in members)]
    column = {head: 0 if head in shared else 1 for head in groups}
    for _ in groups:  # longest path; as many rounds as there are groups suffice
        for node in nodes:
            head = group_of[node.name]
            others = {group_of[source] for source in node.inputs.values()} - {head}
            if head not in shared:
                column[head] = max([column[head], *(column[other] + 1 for other in others)])
                column[head] = min(column[head], len(groups))
    places: dict[str, Place] = {}
    lowest: dict[int, int] = {}  # last row that is taken in each column
    for head, members in groups.items():
        if head in shared:
            continue
        rows = _rows_around(head, members)
        base = 0 if column[head] not in lowest else lowest[column[head]] + 1 - min(rows.values())
        for name, row in rows.items():
            places[name] = (column[head], base + row)
        lowest[column[head]] = base + max(rows.values())
    last = max((row for _, row in places.values()), default=0)
    above, below = -1, max(last, 1)
    for head in shared:
        users = [node for node in nodes if head in node.inputs.values() and group_of[node.name] not in shared]
        if users and all(places[node.name][1] > 0 for node in users):
            places[head], below = (0, below), below + 1
        else:
            places[head], above = (0, above), above - 1
    return places


def _groups(nodes: list[Node]) -> dict[str, list[Node]]:
    names = {node.name for node in nodes}
    groups: dict[str, list[Node]] = {}
    for node in nodes:
        prefix = node.name.rpartition(".")[0]
        groups.setdefault(prefix if prefix in names else node.name, []).append(node)
    return groups


def _rows_around(head: str, members: list[Node]) -> dict[str, int]:
    """Row 0 for the head; negative rows, nearest last, for what leads to it; positive ones for the rest."""
    users = {node.name: [other for other in members if node.name in other.inputs.values()] for node in members}

    def distance(name: str, seen: tuple[str, ...] = ()) -> int | None:
        if name == head:
            return 0
        ways = [distance(user.name, (*seen, name)) for user in users[name] if user.name not in seen]
        return max((way + 1 for way in ways if way is not None), default=None)

    above = {node.name: steps for node in members if (steps := distance(node.name)) and node.name != head}
    rows, taken = {head: 0}, {0}
    for name, steps in sorted(above.items(), key=lambda item: item[1]):
        rows[name] = min(-steps, min(taken) - 1)
        taken.add(rows[name])
    for node in members:
        if node.name not in rows:
            rows[node.name] = max(taken) + 1
            taken.add(rows[node.name])
    return rows


def _draw(
    nodes: list[Node], places: dict[str, Place], edges: list[tuple[str, str]], paper: Paper, anchor: str, name: str
) -> str:
    columns = 1 + max((column for column, _ in places.values()), default=0)
    rows = [row for _, row in places.values()] or [0]
    first = min(rows)
    (box_u, box_v), margin = paper.box, paper.margin
    length = 2 * margin + columns * box_u + (columns - 1) * paper.gap_u
    breadth = 2 * margin + (max(rows) - first + 1) * (box_v + paper.gap_v) - paper.gap_v
    width, height = (length, breadth) if paper.sideways else (breadth, length)
    lines = [_line(places[source], places[target], places, paper, breadth) for source, target in edges]
    boxes = [_box(node, paper, *paper.corner(places[node.name], first), anchor) for node in nodes]
    paths = "".join(f'<path d="{line}" marker-end="url(#tip-{name})"/>' for line in lines)
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" style="max-width:{width:g}px" role="img" '
        f'aria-label="Graph of the stages">'
        f'<defs><marker id="tip-{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        f'orient="auto"><path d="M0 0.5 7.5 4 0 7.5z"/></marker></defs>'
        f'<g class="edges">{paths}</g>{"".join(boxes)}</svg>'
    )


def _line(start: Place, end: Place, places: dict[str, Place], paper: Paper, breadth: float) -> str:
    """Path of an edge, leaving and entering in the middle of a side of the boxes."""
    first = min(row for _, row in places.values())
    taken = set(places.values())
    (box_u, box_v), at = paper.box, paper.point
    (u0, v0), (u1, v1) = paper.corner(start, first), paper.corner(end, first)
    mid_u0, mid_v0, mid_u1, mid_v1 = u0 + box_u / 2, v0 + box_v / 2, u1 + box_u / 2, v1 + box_v / 2
    (column0, row0), (column1, row1) = start, end
    between = [(column, row1) for column in range(column0 + 1, column1)]
    if column0 == column1 and not any((column0, row) in taken for row in range(*sorted((row0 + 1, row1)))):
        down = row1 > row0
        return f"M{at(mid_u0, v0 + box_v * down)}L{at(mid_u1, v1 + box_v * (not down))}"
    if column0 == column1:  # around the boxes in between
        out = u0 + box_u + paper.gap_u / 2
        return f"M{at(u0 + box_u, mid_v0)}C{at(out, mid_v0)} {at(out, mid_v1)} {at(u1 + box_u, mid_v1)}"
    if row0 == row1 and not taken & set(between):
        return f"M{at(u0 + box_u, mid_v0)}L{at(u1, mid_v1)}"
    if column0 == 0 or len(between) > 1 or taken & set(between):  # along the edge of the paper, shared by many
        upper = row1 < 0 or (row1 == 0 and row0 < 0)
        outside = paper.margin - 12 if upper else breadth - paper.margin + 12
        leave, enter = (v0, v1) if upper else (v0 + box_v, v1 + box_v)
        beyond = range(first, row1) if upper else range(row1 + 1, max(row for _, row in places.values()) + 1)
        turn = 8 if upper else -8
        way = f"M{at(mid_u0, leave)}L{at(mid_u0, outside + turn)}Q{at(mid_u0, outside)} {at(mid_u0 + 8, outside)}"
        if any((column1, row) in taken for row in beyond):  # another box is in the way: enter from before
            gap = u1 - paper.gap_u / 2
            return f"{way}L{at(gap - 8, outside)}Q{at(gap, outside)} {at(gap, outside + turn)}" + (
                f"L{at(gap, mid_v1 - turn)}Q{at(gap, mid_v1)} {at(u1, mid_v1)}"
            )
        return f"{way}L{at(mid_u1 - 8, outside)}Q{at(mid_u1, outside)} {at(mid_u1, outside + turn)}L{at(mid_u1, enter)}"
    bend = (u0 + box_u + u1) / 2
    return f"M{at(u0 + box_u, mid_v0)}C{at(bend, mid_v0)} {at(bend, mid_v1)} {at(u1, mid_v1)}"


def _box(node: Node, paper: Paper, u: float, v: float, anchor: str) -> str:
    x, y = (u, v) if paper.sideways else (v, u)
    prefix, _, suffix = node.name.rpartition(".")
    inset = 15 if paper.sideways else 11
    label = suffix if prefix and suffix in INSERTED else node.name
    label = prefix if label == "prepare" and prefix == "evaluation" else label
    state = "is-missing" if not node.is_made else "is-reused" if node.reused else ""
    small = [quantity(node.get("tokens")) + " tokens"] if node.kind == "train" else []
    if paper.sideways or not small:
        small += [duration(node.seconds)] if node.is_made else ["not made"]
    title = f"{node.name}: {LABELS.get(node.kind, node.kind)}" + (", reused" if node.reused else "")
    return (
        f'<a href="#{escape(anchor + node.name)}" class="node kind-{escape(node.kind)} {state}">'
        f"<title>{escape(title)}</title>"
        f'<rect x="{x:g}" y="{y:g}" width="{paper.width:g}" height="{paper.height:g}" rx="7"/>'
        f'<rect class="band" x="{x:g}" y="{y:g}" width="5" height="{paper.height:g}" rx="2.5"/>'
        f'<text x="{x + inset:g}" y="{y + paper.height / 2 - 4:g}">{escape(label)}</text>'
        f'<text class="small" x="{x + inset:g}" y="{y + paper.height / 2 + 14:g}">{escape(" · ".join(small))}</text>'
        f"</a>"
    )

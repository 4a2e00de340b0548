"""The doctor's page: findings, and samples in which each token shows what becomes of it. One file, nothing to load."""

from __future__ import annotations

import json

import jinja2

from threefold.data.doctor import Examined

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; } td, th { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0; }
.error { color: #b00020; font-weight: 600; } .warning { color: #8a6100; font-weight: 600; }
.sample { white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.7 ui-monospace, monospace;
  border: 1px solid #ddd; border-radius: 6px; padding: .8rem; }
.sample span, .legend span { border-radius: 2px; box-shadow: inset -1px 0 #fff; }
.context { background: #f0f0f0; color: #666; } .trained { background: #c9efcf; }
.stop { background: #2f8f46; color: #fff; } .control { background: #cfe3f7; color: #345; }
.cut { background: #f7c9c9; text-decoration: line-through; }
small { color: #666; } pre { overflow-x: auto; font-size: 12px; }
@media (prefers-color-scheme: dark) { body { background: #161616; color: #ddd; } .sample { border-color: #444; }
  .context { background: #2a2a2a; color: #999; } .trained { background: #1f4d2a; }
  .control { background: #223a52; color: #bcd; }
  .cut { background: #5a2323; } .error { color: #ff8a8a; } .warning { color: #e8c15a; }
  .sample span, .legend span { box-shadow: inset -1px 0 #161616; } }
"""

_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ name }}: data</title><style>{{ style }}</style></head><body>
<h1>{{ name }}: data</h1>
<p>{{ report.errors|length }} errors, {{ report.warnings|length }} warnings.
{% for line in report.extent %}<br><small>{{ line }}</small>{% endfor %}</p>
{% if report.findings %}<table><tr><th></th><th>check</th><th>what</th></tr>
{% for finding in report.findings %}<tr><td class="{{ finding.severity }}">{{ finding.severity }}</td>
<td>{{ finding.check }}</td><td>{{ finding.message }}
{% if finding.examples|length > 1 %}<br><small>{{ finding.examples|join(", ") }}</small>{% endif %}</td></tr>
{% endfor %}</table>{% endif %}
<h2>What is trained on</h2>
<p class="legend"><span class="trained">trained</span> <span class="stop">trained: ends the answer</span>
<span class="context">context</span> <span class="control">control token of the template</span>
<span class="cut">beyond the length limit</span></p>
{% for sample in samples %}<h3>{{ sample.step }}: {{ sample.title }}
<small>{{ sample.origin }}, {{ sample.num_tokens }} tokens, {{ sample.num_trained }} trained</small></h3>
<div class="sample">{% for piece in sample.pieces %}<span class="{{ piece.kind }}">{{ piece.text }}</span>
{%- endfor %}</div>
{% else %}<p>No row was rendered.</p>{% endfor %}
<h2>Statistics</h2><details><summary>all numbers</summary><pre>{{ statistics }}</pre></details>
</body></html>
"""


def page(name: str, examined: Examined) -> str:
    """The page as HTML; all texts of the data are escaped."""
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(_PAGE)
    statistics = json.dumps(dict(examined.report.statistics), indent=2, ensure_ascii=False)
    return template.render(
        name=name, style=_STYLE, report=examined.report, samples=examined.samples, statistics=statistics
    )

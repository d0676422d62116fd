"""The template of report.html, for jinja2 with autoescape: every name that comes from outside is escaped."""

TEMPLATE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ title }}</title>
<style>
:root {
  --page: #f6f7f9; --card: #ffffff; --ink: #1b1f24; --soft: #57606a; --line: #d8dee4; --bar: #0072b2; --mark: #b34700;
  --track: #e6ebf0;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171b; --card: #1d2127; --ink: #e6e9ed; --soft: #9aa4af; --line: #353c45; --bar: #56b4e9; --mark: #f0a35e;
    --track: #2d343c;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; padding: 1.25rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
main { max-width: 68rem; margin: 0 auto; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 0 0 .5rem; }
p { margin: .25rem 0 .75rem; color: var(--soft); overflow-wrap: anywhere; }
section {
  background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: 1rem 1.1rem; margin: 1rem 0;
}
.warning { border-left: .35rem solid var(--mark); }
.warning p { color: var(--ink); margin: 0; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .75rem; margin: 1rem 0; }
.facts div { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .6rem .8rem; }
.facts dt { color: var(--soft); font-size: .8rem; }
.facts dd { margin: 0; font-size: 1.25rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
.picture { background: #fff; border-radius: .4rem; }
img { display: block; width: 100%; min-width: 34rem; height: auto; margin: 0 auto; }
#confusion img { max-width: 52rem; }
#mistakes img { max-width: 46rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .6rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
td.number, th.number { text-align: right; padding-right: 1rem; white-space: nowrap; }
td.recall { white-space: nowrap; }
td.value { overflow-wrap: anywhere; }
tr:last-child td { border-bottom: 0; }
.share { display: inline-block; width: 5rem; height: .6rem; margin-right: .5rem; border-radius: .3rem;
  background: var(--track); overflow: hidden; }
.share i { display: block; height: 100%; background: var(--bar); }
.changed { font-weight: 650; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); gap: 0 1rem; }
details summary { cursor: pointer; font-weight: 600; }
footer { color: var(--soft); font-size: .8rem; margin: 1.5rem 0 .5rem; }
@media (max-width: 40rem) { body { padding: .75rem; } section { padding: .8rem; } .share { width: 2.5rem; } }
@media print { body { background: #fff; } section { break-inside: avoid; } }
</style>
</head>
<body>
<main>
<header>
<h1>{{ title }}</h1>
<p>{{ run }}</p>
</header>
{% if instead_of %}
<section class="warning" id="instead-of">
<h2>Not CIFAR-10</h2>
<p>Trained on scikit-learn's handwritten digits instead. {{ instead_of }}.</p>
</section>
{% endif %}
{% if broken %}
<section class="warning" id="broken-lines">
<p>{{ broken }} line{{ "s" if broken > 1 }} of metrics.jsonl and steps.jsonl could not be read.</p>
</section>
{% endif %}
<dl class="facts" id="facts">
{% for name, value in facts %}
<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>
{% endfor %}
</dl>
{% macro picture(one) %}
<section id="{{ one.name }}">
<h2>{{ one.title }}</h2>
<p>{{ one.words }}</p>
{% if one.data %}
<div class="wide picture"><img alt="{{ one.title }}" src="{{ one.data }}"></div>
{% else %}
<p>This picture could not be drawn.</p>
{% endif %}
</section>
{% endmacro %}
{{ picture(pictures.curves) }}
{{ picture(pictures.confusion) }}
<section id="classes">
<h2>Classes</h2>
<p>Recall is the share of a class's images that are found, precision the share of what was taken for it that is
right.</p>
<div class="wide">
<table>
<thead>
<tr><th>class</th><th class="number">test images</th><th>recall</th><th class="number">precision</th>
<th>most often taken for</th></tr>
</thead>
<tbody>
{% for row in classes %}
<tr><td>{{ row.name }}</td><td class="number">{{ "{:,}".format(row.images) }}</td>
<td class="recall"><span class="share"><i style="width:{{ '%.1f' % (100 * (row.recall or 0)) }}%"></i></span>
{{ row.recall | percent }}</td>
<td class="number">{{ row.precision | percent }}</td><td>{{ row.taken_for }}</td></tr>
{% endfor %}
</tbody>
</table>
</div>
</section>
{{ picture(pictures.mistakes) }}
{% if pairs %}
<section id="pairs">
<h2>The commonest mistakes</h2>
<div class="wide">
<table>
<thead><tr><th>true class</th><th>taken for</th><th class="number">images</th></tr></thead>
<tbody>
{% for label, predicted, images in pairs %}
<tr><td>{{ label }}</td><td>{{ predicted }}</td><td class="number">{{ images }}</td></tr>
{% endfor %}
</tbody>
</table>
</div>
</section>
{% endif %}
{% if epochs %}
<section id="epochs">
<details>
<summary>Every epoch</summary>
<div class="wide">
<table>
<thead><tr><th class="number">epoch</th><th class="number">step</th><th class="number">training loss</th>
<th class="number">accuracy</th><th class="number">test loss</th><th class="number">accuracy</th>
<th class="number">lr</th></tr></thead>
<tbody>
{% for row in epochs %}
<tr><td class="number">{{ row.epoch }}{{ "" if row.get("complete", true) else " (part)" }}</td>
<td class="number">{{ row.step }}</td>
{% for kind in ("train", "test") %}
<td class="number">{{ "-" if row.get(kind ~ "_loss") is none else "%.4f" % row[kind ~ "_loss"] }}</td>
<td class="number">{{ row.get(kind ~ "_accuracy") | percent }}</td>
{% endfor %}
<td class="number">{{ "-" if row.get("lr") is none else "%.3g" % row.lr }}</td></tr>
{% endfor %}
</tbody>
</table>
</div>
</details>
</section>
{% endif %}
<div class="columns">
<section id="configuration">
<h2>Configuration</h2>
<p>In bold what differs from the option's default, chosen by hand or to suit the data set.</p>
<table>
<tbody>
{% for name, value, changed in configuration %}
<tr{% if changed %} class="changed"{% endif %}><td>{{ name }}</td><td class="value">{{ value }}</td></tr>
{% endfor %}
</tbody>
</table>
</section>
<section id="machine">
<h2>Machine and versions</h2>
<table>
<tbody>
{% for name, value in machine %}
<tr><td>{{ name }}</td><td class="value">{{ value }}</td></tr>
{% endfor %}
</tbody>
</table>
</section>
</div>
<footer>Written {{ written }} by fastres.</footer>
</main>
</body>
</html>
"""

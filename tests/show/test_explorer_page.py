"""The explorer's page in a real browser, used as a reader would."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from steerkit.show.report import write_report
from steerkit.sweeps.result import SweepResult
from tests.browser import Tab
from tests.sweep_tables import ARABIC, EMOJI, data_of, table, tokens

EVIL = "</script><img src=x onerror=alert(1)><script>alert(2)</script><b>'\"&amp;\u2028<!-- javascript:alert(3)"
BOXES = ("texts", "slide", "link-status")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    frame = table()
    frame.loc[frame["coefficient"] == -2, "trait"] = np.nan
    frame["relative_dose"] *= 1.0163
    path = tmp_path_factory.mktemp("page") / "page.html"
    along = tokens(frame[~frame["vector"].str.startswith("random")])
    write_report(path, title="Two vectors", sweep=SweepResult(frame), summary=["One."], projections=along)
    return path


def steered(tab: Tab) -> str:
    return str(tab.js("document.getElementById('steered').textContent"))


def status(tab: Tab) -> str:
    return str(tab.js("document.getElementById('link-status').textContent"))


def chosen(tab: Tab) -> dict[str, Any]:
    """What the page says it shows: the choices' texts and the coefficient."""
    return tab.js(
        "Object.fromEntries([...document.querySelectorAll('#stage select')].map((s) => [s.id, "
        "s.selectedOptions[0].textContent]).concat([['coefficient', document.getElementById('value').textContent]]))"
    )


def choose(tab: Tab, choice: str, text: str) -> None:
    """What choosing an entry of a list does."""
    tab.js(
        f"(() => {{ const s = document.getElementById('{choice}'); "
        f"s.selectedIndex = [...s.options].findIndex((o) => o.textContent.startsWith({json.dumps(text)})); "
        "s.dispatchEvent(new Event('change', { bubbles: true })); })()"
    )


def test_moving_the_slider_changes_the_text_at_once(tab: Tab, page: Path) -> None:
    tab.open(page)
    assert steered(tab) == "plain words 0 0 and formal 0.5 at the end"
    tab.js("document.getElementById('coefficient').focus()")
    tab.press("ArrowRight")
    assert steered(tab) == "plain words 0 0 and formal 2 at the end"
    assert tab.js("document.getElementById('plain').textContent") == "plain words 0 0 of no vector at the end"
    assert tab.js("document.getElementById('coefficient').getAttribute('aria-valuetext')") == "+2 (relative dose 0.2)"
    for _ in range(9):
        tab.press("ArrowLeft")
    assert steered(tab) == "plain words 0 0 and formal \u22122 at the end".replace("\u2212", "-")
    assert "cut off" not in tab.js("document.getElementById('steered-about').textContent")


def test_a_prompt_is_chosen_by_its_id_and_its_first_words_which_stay_text(tab: Tab, tmp_path: Path) -> None:
    words = {"q0": "A day <img src=x onerror='alert(1)' " + "and more " * 20, "q1": "B & <i"}
    frame = table(vectors=("v",), layers=(3,), prompts=2, samples=1)
    write_report(
        tmp_path / "page.html", title="Two", sweep=SweepResult(frame.assign(prompt=frame["prompt_id"].map(words)))
    )
    tab.open(tmp_path / "page.html")
    long, short = tab.js("[...document.getElementById('prompt_id').options].map((o) => o.textContent)")
    assert long == f"q0: {words['q0'][:69]}\u2026" and short == "q1: B & <i"
    assert tab.js("document.images.length") == 0 and tab.events("Page.javascriptDialogOpening") == []


def test_words_that_differ_are_marked_and_no_others(tab: Tab, page: Path) -> None:
    tab.open(page)
    marks = "[...document.querySelectorAll('#{} {}')].map((e) => e.textContent)"
    assert tab.js(marks.format("plain", "del")) == ["of no vector"]
    assert tab.js(marks.format("steered", "ins")) == ["and formal 0.5"]
    tab.js("document.getElementById('coefficient').focus()")
    tab.press("ArrowLeft")
    assert chosen(tab)["coefficient"] == "0 (relative dose 0)"
    assert tab.js(marks.format("plain", "del")) == tab.js(marks.format("steered", "ins")) == []


def test_keys_move_coefficient_and_prompt_search_and_help(tab: Tab, page: Path) -> None:
    tab.open(page)
    tab.press("ArrowRight")
    tab.press("j")
    assert steered(tab) == "plain words 1 0 and formal 2 at the end"
    tab.press("k")
    tab.press("k")  # there is none above the first
    tab.press("ArrowLeft")
    assert steered(tab) == "plain words 0 0 and formal 0.5 at the end"
    tab.press("/")
    assert tab.js("document.activeElement.id") == "find"
    tab.press("ArrowRight")  # in the field it is the field's
    assert chosen(tab)["coefficient"].startswith("+0.5")
    tab.press("Escape")
    assert tab.js("document.activeElement.tagName") == "BODY"
    tab.press("?")
    assert tab.js("document.getElementById('help').open")
    tab.press("ArrowRight")
    assert chosen(tab)["coefficient"].startswith("+0.5")
    tab.press("Escape")
    assert not tab.js("document.getElementById('help').open")
    tab.js("document.getElementById('single-keys').checked = false")
    tab.press("?")
    assert not tab.js("document.getElementById('help').open")


def test_a_link_restores_the_state(tab: Tab, page: Path) -> None:
    tab.open(page)
    for choice, text in (("vector", "terse"), ("layer", "12"), ("prompt_id", "q2"), ("sample", "1")):
        choose(tab, choice, text)
    tab.js("document.getElementById('coefficient').focus()")
    tab.press("ArrowRight")
    tab.js("document.getElementById('find').focus()")
    tab.type("no vector & more")
    wanted, text = chosen(tab), steered(tab)
    assert text == "plain words 2 1 and terse 2 at the end"
    fragment = tab.until("location.hash.includes('more') && location.hash")
    assert fragment == tab.js("document.getElementById('link').hash")
    tab.open(page)
    assert steered(tab) != text
    tab.js(f"location.hash = {json.dumps(fragment)}")
    tab.until("document.getElementById('find').value")
    assert (chosen(tab), steered(tab)) == (wanted, text)
    tab.open(page, fragment)
    assert (chosen(tab), steered(tab)) == (wanted, text)
    assert tab.js("document.getElementById('find').value") == "no vector & more"
    assert status(tab) == ""


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep over doses of "steps" at layer 20 and "program" at layer 10, which opens on the first."""
    frame = table(vectors=("program", "steps"), layers=(10, 20))
    frame = frame[(frame["vector"] == "steps") == (frame["layer"] == 20)]
    sweep = SweepResult(frame.assign(dose=frame["coefficient"]))
    path = tmp_path_factory.mktemp("doses") / "page.html"
    write_report(path, title="Doses", sweep=sweep, opens_on={"vector": "steps", "layer": 20, "coefficient": 2.0})
    return path


@pytest.mark.parametrize(
    ("link", "text", "told"),
    [
        ("#vector=steps&layer=10&prompt=q2&dose=0.5", "2 0 and steps 0.5", ['layer "10" (shown: 20)']),
        ("#vector=program&layer=20", "0 0 and program 2", ['layer "20" (shown: 10)']),
        ("#vector=nope", "0 0 and steps 2", ['vector "nope" (shown: steps)']),
        ("#foo=bar", "0 0 and steps 2", ['foo "bar" (no such field)']),
        ("#dose=abc", "0 0 and steps 2", ['dose "abc" (shown: 2)']),
        ("#dose=&prompt=%ff", "0 0 and steps 2", ['dose "" (shown: 2)', 'prompt "\ufffd" (shown: q0)']),
        ("#dose=1.9&sample=1", "0 1 and steps 2", ['dose "1.9" (shown: 2)']),
        ("#vector=steps&layer=20&prompt=q0&sample=0&dose=2.0&find=plain", "0 0 and steps 2", []),
    ],
)
def test_every_field_of_a_link_that_the_page_does_not_show_is_named_and_replaced_by_the_opening_text(
    tab: Tab, two_layers: Path, link: str, text: str, told: list[str]
) -> None:
    tab.open(two_layers, link)
    assert steered(tab) == f"plain words {text} at the end"
    assert status(tab) == (f"No text for this link: {', '.join(told)}." if told else "")
    tab.press("ArrowLeft")
    assert status(tab) == ""


@pytest.mark.parametrize("width", [400, 900])
def test_a_link_opens_at_its_text_and_its_message_is_in_view(tab: Tab, page: Path, width: int) -> None:
    tab.window(width)
    tab.open(page, "#prompt=q2&layer=9")
    box = "document.getElementById('{}').getBoundingClientRect()"
    texts, slide, message = (tab.js(f"(({{top, bottom}}) => [top, bottom])({box.format(name)})") for name in BOXES)
    assert slide[0] == 0 and 0 <= texts[0] - slide[1] < 24
    assert slide[0] < message[0] < message[1] < slide[1] and tab.js("scrollY") > 0


def test_the_down_key_scrolls_the_page(tab: Tab, page: Path) -> None:
    tab.open(page)
    before = steered(tab)
    assert tab.js("scrollY") == 0
    tab.press("ArrowDown")
    tab.until("scrollY > 0")
    assert steered(tab) == before


def test_the_page_opens_on_what_the_writer_named_and_remembers_the_theme(tab: Tab, tmp_path: Path) -> None:
    path = tmp_path / "opens.html"
    write_report(
        path,
        title="Opens",
        sweep=SweepResult(table()),
        opens_on={"vector": "terse", "layer": 12, "coefficient": 2.0},
        texts_of="3 test questions",
        summary=pd.DataFrame({"persona": ["terse"], "verdict": ["steered"]}),
    )
    tab.open(path)
    assert steered(tab) == "plain words 0 0 and terse 2 at the end"
    assert tab.js("document.getElementById('explorer-title').textContent") == "Texts and curves: 3 test questions"
    assert tab.js("document.querySelector('#summary td[data-name=verdict]').textContent") == "steered"
    theme = tab.js("document.documentElement.dataset.theme ?? ''")
    tab.js("document.getElementById('theme').click()")
    chosen_theme = tab.js("document.documentElement.dataset.theme")
    assert chosen_theme != theme
    tab.open(path)
    assert tab.js("document.documentElement.dataset.theme") == chosen_theme
    tab.js("localStorage.removeItem('steerkit-theme')")


def test_a_chat_shows_its_roles_and_scores_their_plain_names(tab: Tab, tmp_path: Path) -> None:
    frame = table()
    prompt = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    frame = frame.assign(prompt=prompt, rouge_l=0.5, right=(frame["coefficient"] > 0).astype(float), own_score=1.5)
    path = tmp_path / "chat.html"
    tokens = {"<|im_start|>": 1, "<|im_end|>": 2}
    write_report(path, title="Chat", sweep=SweepResult(frame, {"special_tokens": tokens}))
    tab.open(path)
    assert tab.js("[...document.querySelectorAll('#prompt .role')].map((x) => x.textContent)") == ["system", "user"]
    assert tab.js("document.getElementById('prompt').textContent") == "systemBe kind.\nuserWhy?"
    headings = tab.js("[...document.querySelectorAll('h4')].map((x) => x.textContent)")
    assert "ROUGE-L with the reference" in headings and "own_score" in headings
    assert "right answer: yes" in tab.js("document.getElementById('steered-about').textContent")
    assert "right answer: no" in tab.js("document.getElementById('plain-about').textContent")
    assert tab.js("document.querySelectorAll('#scores h4').length") == 2
    assert not tab.js("document.querySelector('.more').open")


def test_search_lists_what_matches_marks_it_and_goes_there(tab: Tab, page: Path) -> None:
    tab.open(page)
    tab.press("/")
    tab.type("TERSE -2")
    assert tab.js("document.getElementById('search-status').textContent") == "16 of 392 texts"
    assert tab.js("document.querySelectorAll('#hits li').length") == 16
    assert set(tab.js("[...document.querySelectorAll('#hits mark')].map((e) => e.textContent)")) == {"terse -2"}
    tab.js("document.querySelectorAll('#hits button')[3].click()")
    assert steered(tab) == "plain words 1 1 and terse -2 at the end"
    marks = tab.js("[...document.querySelectorAll('#steered mark')].map((e) => e.textContent)")
    assert len(marks) > 1 and "".join(marks) == "terse -2"  # cut where tokens are
    tab.js("document.getElementById('find').focus()")
    tab.press("Enter")
    assert steered(tab) == "plain words 2 0 and terse -2 at the end"
    tab.press("Escape")
    assert tab.js("document.querySelectorAll('mark').length") == 0
    tab.press("/")
    tab.type("no vector")  # listed under every vector and layer, counts once
    assert tab.js("document.getElementById('search-status').textContent") == "8 of 392 texts"
    before = chosen(tab)
    tab.press("Enter")
    tab.press("Enter")
    after = chosen(tab)
    assert {key: after[key] for key in ("vector", "layer")} == {key: before[key] for key in ("vector", "layer")}
    assert after["coefficient"].startswith("0") and after["sample"] == "1"
    tab.press("Escape")
    tab.press("/")
    tab.type("(.*")  # no pattern
    assert tab.js("document.getElementById('search-status').textContent") == "0 of 392 texts"
    assert tab.js("document.getElementById('hits').hidden")


def test_the_header_and_the_search_count_the_same_texts(tab: Tab, page: Path) -> None:
    tab.open(page)
    tab.press("/")
    tab.type("no such words")
    assert tab.js("document.getElementById('search-status').textContent") == "0 of 392 texts"
    assert tab.js("document.querySelector('.lede').textContent").startswith("392 texts (480 rows): 6 vectors")


def test_tokens_are_shaded_by_their_projection_and_the_shades_can_be_put_away(tab: Tab, page: Path) -> None:
    tab.open(page)
    spans = "[...document.querySelectorAll('#steered .token')]"
    data = data_of(page)
    row = next(row for row, text in enumerate(data["rows"]["text"]) if data["strings"][text] == steered(tab))
    values, (centre, _) = data["rows"]["projections"][row], data["conditions"]["0,0"]["shade"]
    titles = tab.js(f"{spans}.map((e) => [e.title, e.className])")
    found = list(dict.fromkeys(map(tuple, titles)))  # a token on the edge of a difference is two spans
    assert [float(title.replace("\u2212", "-")) for title, _ in found] == pytest.approx(values, rel=1e-3)
    assert [name == "token low" for _, name in found] == [value < centre for value in values]
    colours = tab.js(f"{spans}.map((e) => getComputedStyle(e).backgroundColor)")
    assert len(set(colours)) > 5
    tab.js("document.getElementById('shade').click()")
    assert tab.js(f"{spans}.length") == 0
    choose(tab, "vector", "random-0")
    assert tab.js("document.getElementById('scale').hidden && !document.getElementById('no-scale').hidden")


def test_curves_follow_the_choice_and_say_their_values_as_a_table(tab: Tab, page: Path) -> None:
    tab.open(page)
    card = "document.querySelector('.score')"
    assert tab.js(f"{card}.querySelector('h4').textContent") == "trait score"
    legend = tab.js(f"[...{card}.querySelectorAll('.legend li')].map((e) => e.textContent)")
    assert [re.split(r"[\d\u2212\u2013]", entry)[0] for entry in legend[1:]] == ["random (mean of ", "shuffled"]
    assert legend[0].startswith("formal") and all("area under the curve" in entry for entry in legend)
    data = data_of(page)
    points = data["series"][data["conditions"]["0,0"]["series"][0]]["lines"][0]["points"]
    cells = tab.js(f"[...{card}.querySelectorAll('tbody tr')].map((r) => r.cells[1].textContent)")
    assert cells[0] == "\u2013, 0"  # no value at -2
    assert [float(cell.split(" ")[0].replace("\u2212", "-")) for cell in cells[1:]] == pytest.approx(
        [point[1] for point in points[1:]], rel=0.02
    )
    assert tab.js(f"{card}.querySelector('tr[aria-current] th').textContent") == "+0.5"
    x = f"Number({card}.querySelector('.here').getAttribute('cx'))"
    before = tab.js(x)
    tab.press("ArrowRight")
    assert tab.js(x) > before
    assert tab.js(f"{card}.querySelectorAll('.own .line').length") == 1
    corners = tab.js(f"{card}.querySelector('.own .line').getAttribute('d').split('L').length")
    assert corners == 4  # of five coefficients one has no score
    svg = f"{card}.querySelector('svg')"
    tab.js(f"{svg}.scrollIntoView({{ block: 'center', behavior: 'instant' }})")
    left, top, width, height = tab.js(
        f"(({{ x, y, width, height }}) => [x, y, width, height])({svg}.getBoundingClientRect())"
    )
    tab.click(left + 0.17 * width, top + height / 2)
    assert chosen(tab)["coefficient"].startswith("\u22122")


def test_a_choice_with_one_entry_is_not_shown(tab: Tab, tmp_path: Path) -> None:
    frame = table(vectors=("v",), layers=(3,), prompts=1, samples=1).drop(columns=["reference", "trait", "n_tokens"])
    write_report(tmp_path / "one.html", title="One", sweep=SweepResult(frame))
    tab.open(tmp_path / "one.html")
    assert tab.js("[...document.querySelectorAll('#stage select')].every((s) => s.parentElement.hidden)")
    assert tab.js("document.getElementById('reference').parentElement.hidden")
    assert "v, layer 3, coefficient +0.5" in tab.js("document.getElementById('steered-about').textContent")
    assert tab.js("document.querySelectorAll('.score').length") == 0
    assert "No scores were added" in tab.js("document.getElementById('stage').textContent")
    alone = SweepResult(frame[frame["coefficient"] == 0.5])
    write_report(tmp_path / "alone.html", title="No zero", sweep=alone)
    tab.open(tmp_path / "alone.html")
    assert steered(tab) == "plain words 0 0 and v 0.5 at the end"
    assert tab.js("document.getElementById('plain-about').textContent") == "not in this sweep"
    assert tab.js("document.getElementById('coefficient').disabled")


def test_texts_of_any_script_are_shown_in_their_direction(tab: Tab, tmp_path: Path) -> None:
    texts = {-2.0: "", -0.5: f"{EMOJI} \x07 end", 0.5: ARABIC, 2.0: "\ud83d lone \u202e"}
    frame = table(vectors=("v",), layers=(3,), prompts=2, samples=1)
    shown = [texts.get(c, "plain") for c in frame["coefficient"]]
    frame["text"] = pd.Series(shown, dtype=object)  # pandas' own strings have no lone surrogates
    write_report(tmp_path / "page.html", title=ARABIC, sweep=SweepResult(frame), projections=tokens(frame, 2))
    for coefficient, text in texts.items():
        tab.open(tmp_path / "page.html", f"#coefficient={coefficient:g}")
        assert steered(tab) == (text or "no text")
    tab.open(tmp_path / "page.html", "#coefficient=0.5")
    assert tab.js("getComputedStyle(document.getElementById('steered')).direction") == "rtl"
    assert tab.js("getComputedStyle(document.getElementById('plain')).direction") == "ltr"


def test_hostile_text_is_inert_wherever_it_stands(tab: Tab, tmp_path: Path) -> None:
    frame = table(vectors=(EVIL, f"{EVIL}/random-0"), layers=(3,), prompts=2, samples=1, text=lambda *_: EVIL)
    frame = frame.assign(prompt=EVIL, reference=EVIL, prompt_id=EVIL + frame["prompt_id"])
    frame = frame.rename(columns={"trait": EVIL})
    path = tmp_path / "evil.html"
    meta = {"checkpoint": EVIL, "versions": {EVIL: EVIL}}
    write_report(
        path, title=EVIL, sweep=SweepResult(frame, meta), summary=[EVIL], notes=[EVIL],
        tables={EVIL: pd.DataFrame({EVIL: [EVIL]})}, projections=tokens(frame),
    )  # fmt: skip
    tab.open(path)
    tab.press("ArrowRight")
    tab.press("ArrowDown")
    tab.press("/")
    tab.type("<script>")
    tab.press("Enter")
    assert steered(tab) == EVIL
    assert tab.js("document.querySelectorAll('#hits li').length") > 2
    assert tab.js("document.querySelectorAll('img, b:not(#value), [onerror]').length") == 0
    assert tab.js("document.scripts.length") == 2
    fragment = tab.until("location.hash.includes('find') && location.hash")
    tab.open(path, fragment)
    assert steered(tab) == EVIL and tab.js("document.title").startswith("</script><img")
    assert tab.events("Page.javascriptDialogOpening") == []
    requested = {event["request"]["url"].partition("#")[0] for event in tab.events("Network.requestWillBeSent")}
    assert requested <= {path.as_uri(), "about:blank"}


def test_the_policy_forbids_every_request_script_style_and_markup_but_the_pages_own(tab: Tab, page: Path) -> None:
    tab.open(page)
    assert tab.js("fetch('data:,x').then(() => 'fetched', () => 'refused')") == "refused"
    attempts = (
        "document.body.insertAdjacentHTML('beforeend', '<i id=came></i>')",
        "document.body.innerHTML = '<img src=x onerror=\"window.ran = 1\">'",
        "setTimeout('window.ran = 1')",
        "document.body.append(Object.assign(document.createElement('script'), { text: 'window.ran = 1' }))",
        "document.body.setAttribute('onclick', 'window.ran = 1'), document.body.click()",
    )
    for attempt in attempts:
        tab.js(f"(() => {{ try {{ {attempt}; }} catch {{}} }})()")
    assert tab.until("document.getElementById('stage')") is not None
    assert tab.js("[typeof window.ran, document.getElementById('came'), document.images.length]") == [
        "undefined",
        None,
        0,
    ]
    inline = "Object.assign(document.createElement('style'), { textContent: 'body { color: rgb(1, 2, 3) }' })"
    tab.js(f"document.head.append({inline})")
    assert tab.js("getComputedStyle(document.body).color") != "rgb(1, 2, 3)"
    tab.browser.events.clear()  # the refusals above are logged as errors


CONTRAST = """(() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  canvas.canvas.width = canvas.canvas.height = 1;
  const rgba = (colours) => {
    canvas.clearRect(0, 0, 1, 1);
    for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = (colours) => rgba(colours).map((x) => x / 255)
    .map((x) => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
    .reduce((sum, x, k) => sum + x * [0.2126, 0.7152, 0.0722][k], 0);
  const under = (element) => element === null ? ["Canvas"]
    : [...under(element.parentElement), getComputedStyle(element).backgroundColor];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const found = [];
  while (walker.nextNode()) {
    const parent = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !parent.checkVisibility() || parent.closest("option, script")) continue;
    const style = getComputedStyle(parent), grounds = under(parent);
    const ink = parent.closest("svg") ? style.fill : style.color;
    const [a, b] = [light(grounds), light([...grounds, ink])].sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), walker.currentNode.data.slice(0, 40), parent.tagName]);
  }
  return found.sort((x, y) => x[0] - y[0]);
})()"""


def test_every_text_has_contrast_in_light_and_dark_and_the_switch_turns_them(tab: Tab, page: Path) -> None:
    grounds = []
    for dark in (False, True):
        tab.window(1200, dark=dark)
        tab.open(page, "#find=words&coefficient=2")
        tab.js("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
        for shade in (True, False):
            contrasts = tab.js(CONTRAST)
            assert len(contrasts) > 100 and contrasts[0][0] >= 4.5, (dark, shade, contrasts[:3])
            tab.js("document.getElementById('shade').click()")
        grounds.append(tab.js("getComputedStyle(document.body).backgroundColor"))
        assert tab.js("document.getElementById('theme').ariaPressed") == str(dark).lower()
        tab.js("document.getElementById('theme').click()")
        assert tab.js("document.getElementById('theme').ariaPressed") == str(not dark).lower()
        grounds.append(tab.js("getComputedStyle(document.body).backgroundColor"))
    assert grounds[0] == grounds[3] != grounds[1] == grounds[2]


def test_a_screen_reader_finds_names_landmarks_and_the_changed_text(tab: Tab, page: Path) -> None:
    tab.open(page)
    nodes = [
        (node["role"]["value"], node.get("name", {}).get("value", ""), node)
        for node in tab.call("Accessibility.getFullAXTree")["nodes"]
        if not node["ignored"]
    ]
    roles = [role for role, _, __ in nodes]
    assert {"banner", "main", "navigation", "search", "slider", "status"} <= set(roles)
    named = {"button", "combobox", "slider", "searchbox", "checkbox", "link", "img", "image", "region", "table"}
    nameless = [role for role, name, _ in nodes if role in named and not name]
    assert nameless == [] and tab.js("[...document.querySelectorAll('[role=group]')].every((e) => e.ariaLabel)")
    (slider,) = [node for role, _, node in nodes if role == "slider"]
    assert slider["name"]["value"] == "Coefficient"
    assert tab.js("document.getElementById('live').ariaLive") == "off"  # nothing is announced on arrival
    tab.press("ArrowRight")
    assert tab.js("document.getElementById('live').ariaLive") == "polite"
    tab.press("/")
    tab.type("x")  # marks are no new text
    assert tab.js("document.getElementById('live').ariaLive") == "off"
    assert [tab.js(f"document.querySelectorAll('{name}').length") for name in ("h1", "main")] == [1, 1]


def test_a_narrow_page_does_not_scroll_sideways(tab: Tab, page: Path) -> None:
    tab.window(400)
    tab.open(page)
    tab.js("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert tab.js("document.documentElement.scrollWidth") <= 400
    top = "document.getElementById('{}').getBoundingClientRect().top"
    assert tab.js(top.format("plain")) < tab.js(top.format("steered"))


def test_every_column_of_a_table_is_inside_the_page_when_narrow_and_in_print(tab: Tab, tmp_path: Path) -> None:
    wide = pd.DataFrame({f"a column {i}": [0.25, 0.5] for i in range(14)})
    path = tmp_path / "wide.html"
    write_report(path, title="Wide", sweep=SweepResult(table()), tables={"wide": wide})
    cells = "[...document.querySelectorAll('#tables td')].map((x) => x.getBoundingClientRect().right)"
    tab.window(400)
    tab.open(path)
    assert max(tab.js(cells)) <= 400
    named = "getComputedStyle(document.querySelector('#tables td'), '::before').content"
    assert tab.js(named) == '"a column 0"'
    tab.window(1000)
    tab.call("Emulation.setEmulatedMedia", media="print")
    try:
        assert max(tab.js(cells)) <= 1000
    finally:
        tab.call("Emulation.setEmulatedMedia", media="")

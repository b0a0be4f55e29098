// Which words of two texts differ.

const CJK = String.raw`[\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}]`;
const WORD = new RegExp(String.raw`${CJK}|(?:(?!${CJK})[\p{L}\p{M}\p{N}_'\u2019])+|\S`, "gu");
const MOST_CELLS = 9e6;

// Words, signs and CJK characters; `same` marks those of a longest common subsequence.
function words(text) {
  return Array.from(text.matchAll(WORD), ({ 0: word, index }) =>
    ({ word, start: index, end: index + word.length, same: false }));
}

function compare(a, b) {
  let start = 0, m = a.length, n = b.length;
  while (start < m && start < n && a[start].word === b[start].word) a[start].same = b[start++].same = true;
  while (m > start && n > start && a[m - 1].word === b[n - 1].word) a[--m].same = b[--n].same = true;
  const width = n - start + 1;
  if ((m - start + 1) * width > MOST_CELLS) return;
  const length = new Uint16Array((m - start + 1) * width);
  for (let i = m - 1; i >= start; i--) {
    for (let j = n - 1; j >= start; j--) {
      const here = (i - start) * width + j - start;
      length[here] = a[i].word === b[j].word
        ? length[here + width + 1] + 1 : Math.max(length[here + width], length[here + 1]);
    }
  }
  for (let i = start, j = start; i < m && j < n;) {
    const here = (i - start) * width + j - start;
    if (a[i].word === b[j].word) a[i++].same = b[j++].same = true;
    else if (length[here + width] >= length[here + 1]) i++;
    else j++;
  }
}

// Ranges of the words that differ; neighbours are one range, with the space between them.
function changed(tokens) {
  const ranges = [];
  tokens.forEach((token, k) => {
    if (token.same) return;
    if (k && !tokens[k - 1].same) ranges.at(-1).end = token.end;
    else ranges.push({ start: token.start, end: token.end });
  });
  return ranges;
}

function differences(before, after) {
  const [a, b] = [words(before), words(after)];
  compare(a, b);
  return [changed(a), changed(b)];
}

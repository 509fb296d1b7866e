"""Pictures with captions from installed packages, which `make_demo_corpus.py` trains on.

`build_data` reads Noto emoji named by Unicode CLDR and public-domain clip art with its titles and
keywords, draws them, groups items that look the same or have the same caption, and sets whole
groups aside. WordNet adds captions without a picture, and the Symbola font a second drawing of many
emoji.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from hashlib import sha1
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

DEBIAN = {  # under /usr/share
    "unicode/cldr/common": "unicode-cldr-core",
    "openclipart/svg": "openclipart-svg",
    "openclipart/png": "openclipart-png",
    "wordnet": "wordnet-base",
    "fonts/truetype/noto/NotoColorEmoji.ttf": "fonts-noto-color-emoji",
    "fonts/truetype/ancient-scripts/Symbola_hint.ttf": "fonts-symbola",
}
SIDE = 64  # pixels of a picture
PUBLIC_DOMAIN = ("web.resource.org/cc/PublicDomain", "creativecommons.org/licenses/publicdomain")
# Folders whose words do not describe a picture: desktop themes, drawn stars, colour ramps, places.
SKIPPED: tuple[str, ...] = (
    "computer/icons/",
    "shapes/stars/",
    "special/gradients/",
    "recreation/games/cards/",
)
SKIPPED += ("signs_and_symbols/flags/", "geography/", "people/clothing/pantyhose/")
SKIPPED += ("unsorted/", "special/", "buttons/", "logos/")
SKIPPED_WORDS = set("clipart hash icon icons mapsym simple special theme unsorted various".split())
SKIPPED_WORDS |= {"sexy", "stripper"}
UNFIT = {"hide", "john"}  # titles not to ship
SHORT_WORDS = ("a", "of", "the", "with")
THINGS = ("05", "06", "13", "17", "19", "20")  # animal, artifact, food, object, phenomenon, plant
PERSON = "18"  # numbers of WordNet's lexicographer files


@dataclass
class Item:
    """One picture with its words. All items of a `group` are on one side of the split."""

    name: str  # the id
    title: str
    keywords: list[str]
    source: str  # an emoji sequence, or the path of a PNG
    group: str
    extra: bool = False  # a second drawing of an emoji, trained on and never shipped

    @property
    def captions(self) -> list[str]:
        """The full caption, the title alone, the title with every other keyword."""
        keywords: tuple[list[str], ...] = (self.keywords[:4], [], self.keywords[::2][:3])
        return [", ".join([self.title, *chosen]) for chosen in keywords]


@dataclass
class Data:
    """The training data and the held-out items; `pictures[i]` shows `items[i]`."""

    items: list[Item]
    pictures: np.ndarray  # [N, SIDE, SIDE, 3] uint8, on white
    train_groups: list[list[int]]
    heldout: list[int]  # one item of each group that was set aside
    extra_captions: list[str]  # in the same style, without a picture


def share(path: str) -> Path:
    """Return a folder or file of /usr/share; the error names its Debian package."""
    full = Path("/usr/share") / path
    if not full.exists():
        raise FileNotFoundError(f"{full} is missing: apt-get install {DEBIAN[path]}")
    return full


def read_emoji() -> list[Item]:
    """Read emoji with CLDR's names and keywords; variants of skin tone share a group."""
    names: dict[str, str] = {}
    keywords: dict[str, str] = {}
    items = []
    for folder in ("annotations", "annotationsDerived"):
        text = (share("unicode/cldr/common") / folder / "en.xml").read_text(encoding="utf-8")
        pattern = r'<annotation cp="([^"]+)"( type="tts")?>([^<]+)<'
        for emoji, is_name, annotation in re.findall(pattern, text):
            (names if is_name else keywords)[emoji] = unescape(annotation)
    for emoji, title in names.items():
        if not title.startswith("flag: "):  # a flag is named by its place
            group = re.sub("[\U0001f3fb-\U0001f3ff\ufe0f]", "", emoji)
            tags = [tag.strip() for tag in keywords.get(emoji, "").split("|")]
            tags = [tag for tag in tags if tag and tag not in title and "skin tone" not in tag]
            name = "e" + "-".join(f"{ord(letter):x}" for letter in emoji)
            items.append(Item(name, title, tags, emoji, group))
            if len(emoji) == 1:
                items.append(Item(name + "-line", title, tags, emoji, group, extra=True))
    return sorted(items, key=lambda item: (item.extra, len(item.source), item.name))


def read_lexicon() -> tuple[set[str], list[str]]:
    """Return WordNet's words without names of persons, and captions `thing, kind, kind`."""
    nouns = {}  # by offset: word, lexicographer file, "i" for an instance, offset of its hypernym
    for line in (share("wordnet") / "data.noun").read_text(encoding="utf-8").splitlines():
        cells, hypernym = line.split(" "), re.search(r" @(i?) (\d{8}) n", line)
        if not line.startswith("  "):
            nouns[cells[0]] = (cells[4], cells[1], *(hypernym.groups() if hypernym else ("", "")))
    lexicon, captions = set(), set()
    for part in ("noun", "verb", "adj", "adv"):
        lines = (share("wordnet") / f"index.{part}").read_text(encoding="utf-8").splitlines()
        for cells in (line.split() for line in lines if not line.startswith("  ")):
            word, tagged, sense = cells[0], cells[5 + int(cells[3])], cells[6 + int(cells[3])]
            _, file, instance, parent = nouns[sense] if part == "noun" else ("", "", "", "")
            if not (file == PERSON and instance):
                lexicon.add(word)
            if file in THINGS and tagged != "0" and not instance:
                chain = [word]
                if parent and nouns[parent][3]:
                    chain += [nouns[parent][0], nouns[nouns[parent][3]][0]]
                different = dict.fromkeys(name.lower().replace("_", " ") for name in chain)
                captions.add(", ".join(different))
    return lexicon, sorted(captions)


def plain_words(text: str, lexicon: set[str], authors: set[str]) -> str:
    """Return the English words of a text in lower case, without authors and repetitions."""
    text = re.sub(r"([a-z])([A-Z])", r"\1 \2", unescape(text)).lower()
    words = []
    for word in re.findall(r"[a-z]+", text):
        known = word in lexicon or (word.endswith("s") and word[:-1] in lexicon)
        author = len(word) > 2 and any(name.startswith(word) for name in authors)
        usable = known and not author and word not in SKIPPED_WORDS and len(word) > 2
        if usable or (word in SHORT_WORDS and not author):
            words.append(word)
    return " ".join(dict.fromkeys(words))


def png_pixels(path: Path) -> int:
    """Read width times height from the header of a PNG; some posters have 600 million pixels."""
    with path.open("rb") as file:
        header = file.read(24)
    return int.from_bytes(header[16:20], "big") * int.from_bytes(header[20:24], "big")


def scan_clip_art() -> list[tuple[str, Path, str, list[str], set[str]]]:
    """Return (name, PNG, title, keywords, authors) of each drawing marked as public domain."""
    svg, png, agent = share("openclipart/svg"), share("openclipart/png"), r"\w*:?Agent"
    drawings = []
    for path in sorted(svg.rglob("*.svg")):
        name = path.relative_to(svg).with_suffix("").as_posix()
        drawn = (png / name).with_suffix(".png")
        text = path.read_text("utf-8", "replace")
        work = re.search(r"<(\w+:)?Work\b.*?</(\w+:)?Work>", text, re.DOTALL)
        if name.startswith(SKIPPED) or not work or not drawn.exists():
            continue
        agents = " ".join(re.findall(f"<{agent}.*?</{agent}>", work[0], re.DOTALL))
        about = re.sub(f"<{agent}.*?</{agent}>", "", work[0], flags=re.DOTALL)
        if any(mark in about for mark in PUBLIC_DOMAIN) and png_pixels(drawn) <= 4_000_000:
            title = " ".join(re.findall(r"<dc:title>(.*?)</", about, re.DOTALL))
            title = re.sub(r"^Clipart by .*? - ", "", title).strip()
            tags = re.findall(r"<rdf:li>(.*?)</rdf:li>", about, re.DOTALL)
            people = " ".join(re.findall(r"title>(.*?)<", agents, re.DOTALL)).lower()
            drawings.append((name, drawn, title, tags, set(re.findall(r"[a-z]+", people))))
    return drawings


def read_clip_art(lexicon: set[str]) -> list[Item]:
    """Read clip art with clean words; a title of many drawings is that of a collection."""
    drawings, items = scan_clip_art(), []
    shared = Counter(title for _, _, title, _, _ in drawings)
    for name, drawn, title, tags, authors in drawings:
        *_, folder, file = name.split("/")
        caption = plain_words(title, lexicon, authors) if shared[title] <= 12 else ""
        caption = caption or plain_words(file, lexicon, authors)
        tags = [plain_words(tag.replace("_", " "), lexicon, authors) for tag in [*tags, folder]]
        tags = [tag for tag in reversed(tags) if tag and tag.rstrip("s") not in caption]
        tags = list({tag.rstrip("s"): tag for tag in tags}.values())
        if caption:
            name = "c" + sha1(name.encode()).hexdigest()[:8]
            items.append(Item(name, caption, tags, str(drawn), name))
    often = Counter(tag for item in items for tag in item.keywords)
    for item in items:  # the most common keyword first: it names the kind of thing
        item.keywords.sort(key=lambda tag: (-often[tag], tag))
    return items


def draw(item: Item, colour: Any, line: Any) -> np.ndarray | None:
    """Draw an item on a white square, [SIDE, SIDE, 3]; None if nothing is visible."""
    if item.source.endswith(".png"):
        picture = Image.open(item.source).convert("RGBA")
    else:
        picture = Image.new("RGBA", (272, 240), (0, 0, 0, 0))
        font = line if item.extra else colour
        if item.extra and bytes(font.getmask(item.source)) == bytes(font.getmask("\U0010ffff")):
            return None  # the font has only the sign for a missing character
        text = ImageDraw.Draw(picture)
        text.text((24, 24), item.source, "black", font=font, embedded_color=not item.extra)
    box = picture.getchannel("A").getbbox()
    if box is None or (picture.width == 272 and box[2] - box[0] > 150 and not item.extra):
        return None  # blank, or a sequence that the font draws as two
    picture = picture.crop(box)
    square = Image.new("RGBA", (max(picture.size),) * 2, (255, 255, 255, 255))
    square.alpha_composite(picture, tuple((square.width - n) // 2 for n in picture.size))
    square = square.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    pixels = np.asarray(square)
    return pixels if pixels.std() > 8 else None


def group_items(items: list[Item], pictures: np.ndarray) -> list[list[int]]:
    """Group items with the same group or caption, or the same picture at 16 px."""
    parent = list(range(len(items)))

    def root(i: int) -> int:
        """Return the item that represents the group of item `i`."""
        while parent[i] != i:
            i = parent[i]
        return i

    first: dict[str, int] = {}
    for i, item in enumerate(items):
        for key in (item.group, item.captions[0].lower()):
            parent[root(i)] = root(first.setdefault(key, i))
    step = SIDE // 16
    ink = 255.0 - pictures.reshape(-1, 16, step, 16, step, 3).mean((2, 4)).reshape(len(items), -1)
    ink = (ink / np.linalg.norm(ink, axis=1, keepdims=True)).astype(np.float32)
    for start in range(0, len(items), 512):
        for i, j in np.argwhere(ink[start : start + 512] @ ink.T > 0.985):
            parent[root(start + i)] = root(j)
    groups = defaultdict(list)
    for i in range(len(items)):
        groups[root(i)].append(i)
    return list(groups.values())


def build_data(seed: int, heldout: int) -> Data:
    """Read, draw, group and split. No item of a held-out group is trained on or fitted on."""
    colour = ImageFont.truetype(str(share("fonts/truetype/noto/NotoColorEmoji.ttf")), 109)
    line = ImageFont.truetype(str(share("fonts/truetype/ancient-scripts/Symbola_hint.ttf")), 109)
    lexicon, captions = read_lexicon()
    drawn = [(item, draw(item, colour, line)) for item in read_emoji() + read_clip_art(lexicon)]
    items = [item for item, picture in drawn if picture is not None]
    pictures = np.stack([picture for _, picture in drawn if picture is not None])
    groups = group_items(items, pictures)
    if not 10 <= heldout < len(groups) // 2:
        raise ValueError(f"heldout is {heldout}, expected 10 to half of the {len(groups)} groups")
    groups.sort(key=lambda group: (items[group[0]].extra, group))
    shippable = sum(not items[group[0]].extra for group in groups)
    order = np.random.default_rng(seed).permutation(shippable)
    aside = [groups[i] for i in order[:heldout]]
    taken = {items[i].title.lower() for group in aside for i in group}
    captions = [caption for caption in captions if caption.split(",")[0] not in taken]
    train_groups = [groups[i] for i in sorted(order[heldout:])] + groups[shippable:]
    return Data(items, pictures, train_groups, [group[0] for group in aside], captions)

"""Conversations in the eight MT-Bench categories that the embedded verifier learns from and is asked.

Every category is a small grammar: patterns with slots, several phrasings of each, and follow-up turns that refer back.
An opening turn whose hash falls into a fixed eighth is held out: only `questions` may use it, and nothing else does.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from random import Random
from typing import Any, NamedTuple, TypeVar

from . import lexicon, library_text

CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")

_HELD_OUT_EIGHTH = 5
_QUESTIONS_PER_CATEGORY = 10
_FIRST_QUESTION_ID = 1001
_SYSTEM_SHARE = 0.08
_ATTEMPTS = 400
_SYSTEM_MESSAGES = (
    "You are a helpful assistant.",
    "You are a kind and careful assistant.",
    "Answer the questions of the user.",
)


class Scene(NamedTuple):
    """An opening turn, its answer, and the follow-up turns (user, answer) that may come after it."""

    user: str
    answer: str
    follow_ups: tuple[tuple[str, str], ...]


Pattern = Callable[[Random], Scene]
Row = TypeVar("Row")


def _say(rng: Random, template: str, **slots: object) -> str:
    """Give `template` with one of each `<a|b>` chosen, the innermost first, and every `{slot}` filled in."""
    count = 1
    while count:
        template, count = re.subn(r"<([^<>]*\|[^<>]*)>", lambda match: rng.choice(match[1].split("|")), template)
    return re.sub(r"\{(\w+)\}", lambda match: str(slots[match[1]]) if match[1] in slots else match[0], template)


def _a(noun: str) -> str:
    """Give `noun` with its indefinite article."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _capital(text: str) -> str:
    """Give `text` with its first letter in upper case."""
    return text[0].upper() + text[1:]


def _key(rng: Random, table: Mapping[str, Row]) -> tuple[str, Row]:
    """Pick one entry of `table`."""
    key = rng.choice(list(table))
    return key, table[key]


# writing ------------------------------------------------------------------------------------------------------------


def _letter(rng: Random) -> Scene:
    name, me, other = rng.sample(lexicon.NAMES, 3)
    event, place, tone = rng.choice(list(lexicon.EVENTS)), rng.choice(list(lexicon.PLACES)), rng.choice(lexicon.TONES)
    slots = {"name": name, "me": me, "other": other, "event": event, "place": place, "tone": tone}
    slots["good"] = lexicon.EVENTS[event]
    user = _say(rng, "<Write|Please write|Draft|Can you write> a {tone} <letter|note|email> from {me} to {name} "
                     "about the {event} in {place}.", **slots)  # fmt: skip
    body = (
        "<thank you for coming to|I still think of|I want to tell you about> the {event} in {place}. "
        "<I loved|Everybody enjoyed|The best part was> {good}. "
        "<I hope to see you again soon.|Please write back when you have time.|Let us meet again next year.>"
        "\n\n<Yours|Best wishes|Kind regards>,\n{me}"
    )
    follow_ups = (
        (_say(rng, "<Now say it shorter.|Make it shorter.|Can you shorten it?>"),
         _say(rng, "Dear {name},\n\nthe {event} in {place} was <wonderful|a joy|great>, above all {good}. <Thank "
                   "you!|See you soon!>\n\n{me}", **slots)),
        (_say(rng, "<Now send the same to|Rewrite it for> {other}.", **slots),
         _say(rng, "Dear {other},\n\n" + body, **slots)),
        (_say(rng, "<Add a postscript.|Now add a line at the end.|Please add a P.S.>"),
         _say(rng, "P.S. {name}, <I took many pictures at the {event}, and I will send you the best ones|please "
                   "bring a friend to the next {event} in {place}|I kept a small gift from {place} for you>. "
                   "<Yours|Always yours>, {me}", **slots)),
    )  # fmt: skip
    return Scene(user, _say(rng, "Dear {name},\n\n" + body, **slots), follow_ups)


_COUPLETS = (
    "The {one} {subject} {does} tonight,\nit fills the world with <gentle|silver> light.",
    "O {subject}, so {one} and so {two},\nI wrote this little song for you.",
    "It {does} when the day is done,\nand waits there for the morning sun.",
    "It leaves behind {gift}, my friend,\nand hopes the song will never end.",
    "I close my eyes and hear it call,\nthe {two} {subject}, loved by all.",
)


def _poem(rng: Random) -> Scene:
    subject, (one, two, does, gift) = _key(rng, lexicon.SUBJECTS)
    name, tone = rng.choice(lexicon.NAMES), rng.choice(lexicon.TONES)
    slots = {"subject": subject, "one": one, "two": two, "does": does, "gift": gift, "name": name, "tone": tone}
    user = _say(rng, "<Write|Compose|Please write|Give me> a {tone} <poem|verse> of four lines about the "
                     "{subject} for {name}.", **slots)  # fmt: skip
    first, second, third = rng.sample(_COUPLETS, 3)
    follow_ups = (
        (_say(rng, "<Now add two more lines.|Add two lines.|Write two more lines.>"), _say(rng, third, **slots)),
        (_say(rng, "<Now say it in one sentence.|Turn it into one sentence.|Make it one sentence.>"),
         _say(rng, "The {subject} is {one} and {two}, and it <leaves|gives> {name} {gift}.", **slots)),
        (_say(rng, "<Give it a title.|What would be a good title?|Find a title for it.>"),
         _say(rng, "A good title <is|would be> \"<The {one} {subject}|{name} and the {subject}|Song of the "
                   "{subject}>\".",
              **slots)),
    )  # fmt: skip
    answer = _say(rng, "<Here is a poem for {name}:|For {name}:>\n\n" + first + "\n" + second, **slots)
    return Scene(user, answer, follow_ups)


def _travel(rng: Random) -> Scene:
    place, (sight, food) = _key(rng, lexicon.PLACES)
    day, (name, other) = rng.choice(lexicon.DAYS), rng.sample(lexicon.NAMES, 2)
    slots = {"place": place, "sight": sight, "food": food, "day": day, "name": name, "other": other}
    user = _say(rng, "<Write|Compose|Please write> a <short|little> <travel story|blog post> about a {day} in "
                     "{place} with {name}.", **slots)  # fmt: skip
    answer = _say(
        rng,
        "<On {day} we arrived in {place}.|It was a <sunny|rainy|windy> {day} in {place}.> "
        "<First {name} and I saw|In the morning {name} showed me> {sight}. "
        "<For lunch we shared|Later we tried> {food}, and it <was delicious|tasted better than at home>. "
        "<In the evening we were tired but happy.|If you visit {place}, take your time.|I would go back tomorrow.>",
        **slots,
    )
    follow_ups = (
        (_say(rng, "<Now say it shorter.|Make it shorter.|Can you shorten it?>"),
         _say(rng, "On {day} {name} and I saw {sight} in {place} and <ate|tried> {food}.", **slots)),
        (_say(rng, "<Rewrite it for a child.|Now tell it to a child.|Make it fit for a child.>"),
         _say(rng, "<Guess what!|Listen!> {name} and I went to {place}. We saw {sight}. <Wow!|So pretty!> "
                   "Then we ate {food}. <Yum!|So good!>", **slots)),
        (_say(rng, "<Replace {name} with|Now swap {name} for> {other}.", **slots),
         _say(rng, "On {day} {other} and I <saw|looked at> {sight} in {place}. <Later we tried|For lunch we "
                   "shared> {food}, and it <was delicious|tasted better than at home>.", **slots)),
    )  # fmt: skip
    return Scene(user, answer, follow_ups)


def _advert(rng: Random) -> Scene:
    product, (use, feature) = _key(rng, lexicon.PRODUCTS)
    colour, price, tone = rng.choice(lexicon.COLOURS), rng.randint(2, 9) * 10, rng.choice(lexicon.TONES)
    slots = {"product": product, "use": use, "feature": feature, "colour": colour, "price": price, "tone": tone}
    user = _say(rng, "<Write|Draft|Please write> a {tone} advert for a {colour} {product} that costs {price} dollars.",
                **slots)  # fmt: skip
    answer = _say(
        rng,
        "<Meet|Say hello to|Here comes> the new {colour} {product}! It is <made|perfect> for {use} and "
        "{feature}. <It costs only|You can have it for> {price} dollars. <It is waiting for you.|Get yours "
        "now!|Come and see it today.>",
        **slots,
    )
    follow_ups = (
        (_say(rng, "<Now say it shorter.|Make it shorter.|Can you shorten it?>"),
         _say(rng, "<Meet the {colour} {product}|The {colour} {product}>: <made|perfect> for {use}, and it costs "
                   "only {price} dollars.", **slots)),
        (_say(rng, "<Add a slogan.|Now write a slogan.|What is a good slogan?>"),
         _say(rng, "<Here is a slogan|How about this>: \"<One {colour} {product} for all your|No {product} is "
                   "better for> {use}!\"", **slots)),
        (_say(rng, "<Turn it into three bullet points.|Now as three bullet points.>"),
         _say(rng, "- a {colour} {product} for {use}\n- {feature}\n- only {price} dollars", **slots)),
    )  # fmt: skip
    return Scene(user, answer, follow_ups)


# roleplay -----------------------------------------------------------------------------------------------------------


def _job(rng: Random) -> Scene:
    job, (workplace, work, tool, offer, hard) = _key(rng, lexicon.JOBS)
    name, place, tone = rng.choice(lexicon.NAMES), rng.choice(list(lexicon.PLACES)), rng.choice(lexicon.TONES)
    slots = {"job": _a(job), "workplace": workplace, "work": work, "tool": tool, "offer": offer, "hard": hard}
    slots |= {"name": name, "place": place, "tone": tone, "years": rng.choice(["ten", "twenty", "thirty"])}
    user = _say(rng, "<Pretend you are|Imagine you are|Act as> {job} <in|from> {place} and <greet|welcome> "
                     "{name} in a {tone} way.", **slots)  # fmt: skip
    answer = _say(
        rng,
        "<Welcome to my {workplace}, {name}!|Hello {name}, come in!|Good morning, {name}!> I am {job} <in|from> "
        "{place}, and I have <loved|done> this work for {years} years. <Every day I|Most of the time I> {work}. "
        "<Would you like|May I offer you|Can I give you> {offer}?",
        **slots,
    )
    follow_ups = (
        (_say(rng, "<Stay in your role. |>What is the hardest part of your <work|day>?"),
         _say(rng, "<Well, {name},|Honestly,> the hardest part is {hard}. <But I still love to|Then I am glad "
                   "that I can> {work}.", **slots)),
        (_say(rng, "<Stay in your role. |>Which tool do you need most?"),
         _say(rng, "<That is easy, {name}: my {tool}.|I could not live without my {tool}.> <It helps me to|I "
                   "need it when I> {work} <here in {place}|every day>.", **slots)),
        (_say(rng, "<Now say goodbye to me.|Say goodbye.|I have to go now.>"),
         _say(rng, "<Goodbye|Farewell>, {name}! <Come back to {place} soon.|My {workplace} is always open for you.> "
                   "<Next time you can have {offer}.|Now I have to {work}.>", **slots)),
    )  # fmt: skip
    return Scene(user, answer, follow_ups)


def _character(rng: Random) -> Scene:
    character, (home, today, dream, sound) = _key(rng, lexicon.CHARACTERS)
    name, day, tone = rng.choice(lexicon.NAMES), rng.choice(lexicon.DAYS), rng.choice(lexicon.TONES)
    slots = {"character": character, "who": _a(character), "home": home, "today": today, "dream": dream}
    slots |= {"sound": sound, "name": name, "day": day, "tone": tone, "feels": rng.choice(["happy", "tired", "proud"])}
    user = _say(rng, "<Speak as|You are now|Take the role of> {who} <called|named> {name} and <tell me|talk> "
                     "about your {day}.", **slots)  # fmt: skip
    answer = _say(
        rng,
        "{sound}! <My name is|I am> {name}, {who}, and I live {home}. <On|This> {day} I {today}, and <it made me|now I "
        "am> {feels}. <At night I dream of|My only wish is> {dream}.",
        **slots,
    )
    follow_ups = (
        (_say(rng, "<What do you dream of?|What is your wish?|Do you have a dream?>"),
         _say(rng, "{sound}! I dream of {dream}. <Will you help me?|Maybe it comes true next {day}.> <That would make "
                   "me very happy.|Every {character} needs a dream.>", **slots)),
        (_say(rng, "<Where do you live?|Tell me about your home.|Where can I find you?>"),
         _say(rng, "{sound}! I live {home}. <Ask for {name}, the {character}.|Come and visit me next {day}!> <It is a "
                   "quiet place.|There I dream of {dream}.>", **slots)),
        (_say(rng, "<Now say it shorter.|Say that in one sentence.>"),
         _say(rng, "{sound}! I am {name}, {who}, and on {day} I {today}.", **slots)),
    )  # fmt: skip
    return Scene(user, answer, follow_ups)


# reasoning ----------------------------------------------------------------------------------------------------------


def _order(rng: Random) -> Scene:
    top, middle, low = rng.sample(lexicon.NAMES, 3)
    more, most, least = rng.choice(lexicon.ORDERS)
    slots = {"top": top, "middle": middle, "low": low, "more": more, "most": most, "least": least}
    facts = "{top} is {more} than {middle}. {middle} is {more} than {low}."
    user = _say(rng, f"{facts} <Who is the {{most}}?|Which of them is the {{most}}?|Tell me who is the {{most}}.>",
                **slots)  # fmt: skip
    answer = _say(
        rng,
        "<We know that|Let us see:> {top} is {more} than {middle}, and {middle} is {more} than {low}. "
        "<So the order is|This gives the order> {top}, {middle}, {low}. <Therefore|So> {top} is the {most}.",
        **slots,
    )
    follow_ups = (
        (_say(rng, "<And who|Who> is the {least}?", **slots),
         _say(rng, "The order is {top}, {middle}, {low}. <The last one is|At the end stands> {low}, so {low} is "
                   "the {least}.", **slots)),
        (_say(rng, "<And who|Who> is in the middle?"),
         _say(rng, "The order is {top}, {middle}, {low}. So {middle} is <in the middle|between {top} and {low}>.",
              **slots)),
        (_say(rng, "Is {low} {more} than {top}?", **slots),
         _say(rng, "No. {top} is {more} than {middle} and {middle} is {more} than {low}, so {low} is not {more} "
                   "than {top}.", **slots)),
    )  # fmt: skip
    return Scene(user, answer, follow_ups)


def _moved(rng: Random) -> Scene:
    first, second = rng.sample(lexicon.NAMES, 2)
    start, end = rng.sample(lexicon.CONTAINERS, 2)
    slots = {"first": first, "second": second, "start": start, "end": end, "thing": rng.choice(lexicon.SMALL_THINGS)}
    user = _say(rng, "{first} puts a {thing} into the {start} and leaves. {second} moves it <to|into> the {end}. "
                     "<Where is the {thing} now?|Where does {first} look for the {thing}?>", **slots)  # fmt: skip
    is_now = {"tail": f"So the {slots['thing']} is now in the {end}."}
    looks = {"tail": f"{first} did not see that, so {first} looks in the {start}."}
    story = "<First|At the start> the {thing} is in the {start}. <Then|Later> {second} moves it to the {end}. {tail}"
    answer = _say(rng, story, **slots, **(is_now if "now?" in user else looks))
    follow_ups = (
        (_say(rng, "<And who|Who> moved it?"), _say(rng, "{second} moved the {thing} from the {start} to the "
                                                         "{end}<|, and {first} did not see it>.", **slots)),
        (_say(rng, "<And where|Where> was it <first|at the start>?"),
         _say(rng, "<At the start|First> {first} put the {thing} into the {start}. <Only later|After that> "
                   "{second} moved it to the {end}.", **slots)),
        (_say(rng, "<Does {second} know where it is?|What does {second} know?>", **slots),
         _say(rng, "{second} <knows|can tell> that the {thing} is in the {end}, because {second} moved it.", **slots)),
    )  # fmt: skip
    return Scene(user, answer, follow_ups)


def _syllogism(rng: Random) -> Scene:
    kind, kinds, group, fact = rng.choice(lexicon.KINDS)
    name, colour = rng.choice(lexicon.NAMES), rng.choice(lexicon.COLOURS)
    slots = {"kind": kind, "kinds": kinds, "group": group, "fact": fact, "name": name, "colour": colour}
    user = _say(rng, "All {kinds} are {group}. All {group} {fact}. {name} has a {colour} {kind}. <What "
                     "follows?|What can we conclude?|What do we know about it?>", **slots)  # fmt: skip
    answer = _say(
        rng,
        "<The {colour} {kind} of {name}|What {name} has> is one of the {kinds}, and all {kinds} are {group}. "
        "<Because|Since> all {group} {fact}, <it follows|we know> that {kinds} {fact}, and so does the {kind} of "
        "{name}.",
        **slots,
    )
    follow_ups = (
        (_say(rng, "<Does the colour matter?|Is the colour important?>"),
         _say(rng, "No. <It could be any colour|Even if it were not {colour}>, {kinds} are {group}, and all "
                   "{group} {fact}.", **slots)),
        (_say(rng, "Are all {group} {kinds}?", **slots),
         _say(rng, "No<, not always|, that does not follow>. All {kinds} are {group}, but there can be other "
                   "{group} that are not {kinds}.", **slots)),
    )  # fmt: skip
    return Scene(user, answer, follow_ups)


def _weekday(rng: Random) -> Scene:
    start, steps, name = rng.randrange(7), rng.randint(2, 5), rng.choice(lexicon.NAMES)
    days = [lexicon.DAYS[(start + step) % 7] for step in range(steps + 3)]
    words = ("zero", "one", "two", "three", "four", "five", "six", "seven")
    slots = {"name": name, "start": days[0], "count": words[steps], "end": days[steps], "next": days[steps + 1]}
    slots["thing"] = rng.choice(["trip", "exam", "party", "visit", "meeting"])
    user = _say(rng, "Today is {start}. {name} has a {thing} in {count} days. <On which day is the "
                     "{thing}?|Which day is that?>", **slots)  # fmt: skip
    walk = ", ".join(f"{words[step]} {days[step]}" for step in range(1, steps + 1))
    answer = _say(rng, "<Count from {start}:|We start at {start} and count:> " + walk +
                  ". <So the {thing} of {name} is on {end}.|The {thing} is on {end}.>", **slots)  # fmt: skip
    follow_ups = (
        (
            _say(rng, "<And if it is one day later?|What if it is moved by one day?>"),
            _say(rng, "One day after {end} is {next}. So the {thing} <is|would be> on {next}.", **slots),
        ),
        (
            _say(rng, "<And which day is the day after?|What comes after that day?>"),
            _say(rng, "The {thing} is on {end}. <The day after|After> {end} <is|comes> {next}.", **slots),
        ),
    )
    return Scene(user, answer, follow_ups)


# math ---------------------------------------------------------------------------------------------------------------


def _doubled(rng: Random, number: int) -> tuple[str, str]:
    """Give the follow-up that asks for twice `number`."""
    user = _say(rng, "<And what is twice that?|What is twice that?|Now double it.>")
    return user, f"Twice {number} is {number} + {number} = {2 * number}. The answer is {2 * number}."


def _one_more(rng: Random, number: int) -> tuple[str, str]:
    """Give the follow-up that asks for one more than `number`."""
    user = _say(rng, "<And with one more?|What if it were one more?|Now add one.>")
    return user, f"One more than {number} is {number} + 1 = {number + 1}. The answer is {number + 1}."


def _counted(start: int, step: int, times: int) -> str:
    """Give `times` numbers that go on from `start` in steps of `step`."""
    return ", ".join(str(start + step * time) for time in range(1, times + 1))


def _gain(rng: Random) -> Scene:
    start, more = rng.randint(2, 15), rng.randint(2, 5)
    name, other = rng.sample(lexicon.NAMES, 2)
    slots = {"name": name, "other": other, "items": rng.choice(lexicon.ITEMS), "start": start, "more": more}
    total = slots["total"] = start + more
    user = _say(rng, "{name} has {start} {items} and <gets|buys|finds> {more} more<| from {other}>. How many "
                     "{items} does {name} have<| now>?", **slots)  # fmt: skip
    answer = _say(rng, "{name} <starts with|has> {start} {items}. <Count {more} more|Now add {more}>: "
                  + _counted(start, 1, more) + ". So {start} + {more} = {total}. {name} has {total} {items}.",
                  **slots)  # fmt: skip
    return Scene(user, answer, (_doubled(rng, total), _one_more(rng, total)))


def _loss(rng: Random) -> Scene:
    less = rng.randint(2, 5)
    start = less + rng.randint(2, 15)
    name, other = rng.sample(lexicon.NAMES, 2)
    slots = {"name": name, "other": other, "items": rng.choice(lexicon.ITEMS), "start": start, "less": less}
    left = slots["left"] = start - less
    user = _say(rng, "{name} has {start} {items} and <gives|sells|lends> {less} to {other}. How many {items} "
                     "<are left|does {name} keep>?", **slots)  # fmt: skip
    answer = _say(rng, "{name} <starts with|has> {start} {items}. <Count {less} back|Now take away {less}>: "
                  + _counted(start, -1, less) + ". So {start} - {less} = {left}. {name} has {left} {items} left.",
                  **slots)  # fmt: skip
    return Scene(user, answer, (_doubled(rng, left), _one_more(rng, left)))


def _price(rng: Random) -> Scene:
    price, count = rng.randint(2, 6), rng.randint(2, 6)
    name, items = rng.choice(lexicon.NAMES), rng.choice(lexicon.ITEMS)
    slots = {"name": name, "items": items, "price": price, "count": count, "total": price * count}
    user = _say(rng, "{name} buys {count} {items}. Each one costs {price} dollars. <What does {name} pay?|How much is "
                     "that?|What is the total price?>", **slots)  # fmt: skip
    answer = _say(rng, "<Each of the {count} {items} costs {price} dollars.|We need {count} times {price}.> "
                  "Count in steps of {price}: " + _counted(0, price, count) +
                  ". So {count} * {price} = {total}. {name} pays {total} dollars.", **slots)  # fmt: skip
    return Scene(user, answer, (_doubled(rng, price * count), _one_more(rng, price * count)))


def _rectangle(rng: Random) -> Scene:
    width, height = rng.randint(2, 6), rng.randint(2, 6)
    room = rng.choice(["garden", "room", "field", "carpet", "table", "wall", "yard", "window"])
    slots = {"room": room, "width": width, "height": height, "area": width * height, "name": rng.choice(lexicon.NAMES)}
    user = _say(rng, "The {room} of {name} is {width} <metres|feet> long and {height} <metres|feet> wide. <What is its "
                     "area?|How large is its area?|Find the area.>", **slots)  # fmt: skip
    unit = "metres" if "metres long" in user else "feet"
    user = re.sub(r"(metres|feet)", unit, user)
    answer = _say(rng, "The area is <the length times the width|length times width>. Count in steps of {height}: "
                  + _counted(0, height, width) + ". So {width} * {height} = {area}. The area <of the {room} |>is "
                                                 "{area} square " + unit + ".", **slots)  # fmt: skip
    return Scene(user, answer, (_doubled(rng, width * height), _one_more(rng, width * height)))


# coding -------------------------------------------------------------------------------------------------------------


def _function(rng: Random) -> Scene:
    task, (body, returns, does, test) = _key(rng, lexicon.CODE_TASKS)
    name, other = rng.sample(lexicon.FUNCTION_NAMES, 2)
    argument = rng.choice(lexicon.ARGUMENT_NAMES)
    body, test = body.replace("{a}", argument), test.replace("{f}", name)
    user = _say(
        rng,
        "<Write|Please write|Can you write|Give me> a Python function <called|named> {name} that {task}. "
        "The <list|argument> is called {argument}.",
        name=name,
        task=task,
        argument=argument,
    )
    plain, hint = f"def {name}({argument}):", f"def {name}({argument}: list[int]) -> {returns}:"
    code = "```python\n{}\n{}\n```"
    answer = _say(rng, "<Here is the function:|Sure, here it is:|This function {task}:>\n\n", task=task)
    answer += code.format(plain, body) + _say(rng, "\n\nIt <simply |>{does}.", does=does)
    follow_ups = (
        (_say(rng, "<Now add a type hint.|Add type hints.|Please add type hints.>"),
         _say(rng, "<With type hints it is:|Here it is with type hints:>\n\n") + code.format(hint, body)),
        (_say(rng, "<Now rename it to|Please call it> {other}.", other=other),
         _say(rng, "<The new name is {other}:|Here is {other}:>\n\n", other=other)
         + code.format(f"def {other}({argument}):", body)),
        (_say(rng, "<Now write a test.|Write a test for it.|Can you test it?>"),
         _say(rng, "<Here is a small test:|This line tests it:>\n\n") + f"```python\nassert {test}\n```"),
        (_say(rng, "<Explain it in one sentence.|What does it do?|How does it work?>"),
         _say(rng, "The function {name} takes {argument} and {does}.", name=name, argument=argument, does=does)),
    )  # fmt: skip
    return Scene(user, answer, follow_ups)


def _library(rng: Random, functions: dict[str, str], ask: str) -> Scene:
    """Give a question about one of the documented library `functions`; `ask` is the template of the question."""
    dotted = rng.choice(list(functions))
    module, _, short = dotted.rpartition(".")
    slots = {"dotted": dotted, "module": module, "short": short, "doc": functions[dotted]}
    slots["name"], slots["variable"] = rng.choice(lexicon.NAMES), rng.choice(lexicon.ARGUMENT_NAMES)
    user = _say(rng, ask, **slots)
    answer = _say(
        rng,
        "<The function {short} is in the module {module}.|You find {short} in {module}.> Its documentation "
        "<says|reads>: {doc}",
        **slots,
    )
    follow_ups = (
        (_say(rng, "<How do I import it?|And how do I import it?|Show me the import.>"),
         _say(rng, "<Write|Use> this<| line|>:\n\n```python\nfrom {module} import {short}\n```", **slots)),
        (_say(rng, "<How do I call it?|And how do I call it?|Show me a call.>"),
         _say(rng, "<Import the module and call it|Call it> like this:\n\n```python\nimport {module}\n\n"
                   "result = {module}.{short}({variable})\n```", **slots)),
        (_say(rng, "<Which module is it in?|Where does it live?>"),
         _say(rng, "The function {short} <is in|lives in|belongs to> the module {module}. <So you write|Call it "
                   "as> {module}.{short}.", **slots)),
    )  # fmt: skip
    return Scene(user, answer, follow_ups)


def _code_library(rng: Random) -> Scene:
    functions = library_text.code_functions()
    if not functions:
        return _function(rng)
    return _library(rng, functions, "<What does the function {dotted} do?|Explain {dotted} to me.|What is {dotted} "
                                    "for?|{name} asks what {dotted} does.|Tell {name} about {dotted}.>")  # fmt: skip


# extraction ---------------------------------------------------------------------------------------------------------


def _as_json(fields: dict[str, object]) -> str:
    """Give `fields` as one line of JSON."""
    return "{" + ", ".join(f'"{key}": "{value}"' for key, value in fields.items()) + "}"


def _as_list(fields: dict[str, object]) -> str:
    """Give `fields` as one `Key: value` line each."""
    return "\n".join(f"{_capital(key)}: {value}" for key, value in fields.items())


def _fields(rng: Random, passage: str, fields: dict[str, object], **slots: object) -> Scene:
    """Give a task that copies some of the `fields` out of `passage`, with follow-ups on the others."""
    chosen = {key: fields[key] for key in rng.sample(list(fields), 3)}
    names = list(chosen)
    asked = f"the {names[0]}, the {names[1]} and the {names[2]}"
    user = _say(rng, "<Read this text|Here is a text|Look at this note>: " + passage +
                " <List|Extract|Find|Give me> " + asked + ".", **slots)  # fmt: skip
    other = rng.choice(list(fields))
    follow_ups = (
        (_say(rng, "<Now as JSON.|Give it as JSON.|Put that into JSON.>"), _as_json(chosen)),
        (_say(rng, "<And what is|What is> the {other}?", other=other),
         _say(rng, "The {other} is {value}.", other=other, value=fields[other])),
        (_say(rng, "<Now in one sentence.|Say it in one sentence.>"),
         f"The {names[0]} is {chosen[names[0]]}, the {names[1]} is {chosen[names[1]]} and the {names[2]} is "
         f"{chosen[names[2]]}."),
    )  # fmt: skip
    return Scene(user, _say(rng, "<Here is what the text says|From the text>:\n\n") + _as_list(chosen), follow_ups)


def _purchase(rng: Random) -> Scene:
    buyer, seller = rng.sample(lexicon.NAMES, 2)
    fields: dict[str, object] = {
        "buyer": buyer, "seller": seller, "item": rng.choice(lexicon.GOODS), "price": f"{rng.randint(1, 9)}0 dollars",
        "day": rng.choice(lexicon.DAYS), "place": rng.choice(list(lexicon.PLACES)),
        "colour": rng.choice(lexicon.COLOURS),
    }  # fmt: skip
    passage = (
        "<On {day} {buyer} bought a {colour} {item} in {place}. {seller} sold it for {price}.|{seller} lives in "
        "{place} and sold a {colour} {item} to {buyer} on {day}. It cost {price}.>"
    )
    return _fields(rng, passage, fields, **fields)


def _meeting(rng: Random) -> Scene:
    leader, guest = rng.sample(lexicon.NAMES, 2)
    fields: dict[str, object] = {
        "group": rng.choice(lexicon.CLUBS), "day": rng.choice(lexicon.DAYS), "time": rng.choice(lexicon.HOURS),
        "room": rng.choice(lexicon.ROOMS), "leader": leader, "guest": guest, "snack": rng.choice(lexicon.FOODS),
    }  # fmt: skip
    passage = (
        "<The {group} meets on {day} at {time} in the {room}. {leader} leads it, {guest} is the guest, and there "
        "is {snack}.|{leader} leads the {group}. Come to the {room} on {day} at {time}. The guest is {guest}, "
        "and we serve {snack}.>"
    )
    return _fields(rng, passage, fields, **fields)


def _quote(rng: Random) -> Scene:
    sentences = library_text.topic_sentences()
    if len(sentences) < 3:
        return _meeting(rng)
    authors, quotes = rng.sample(lexicon.NAMES, 3), rng.sample(sentences, 2)
    asked = rng.randrange(2)
    slots = {"a": authors[0], "b": authors[1], "one": quotes[0], "two": quotes[1], "name": authors[asked]}
    slots |= {"quote": quotes[asked], "other": authors[1 - asked], "rest": quotes[1 - asked]}
    user = _say(rng, "{a} wrote: {one} {b} wrote: {two} <What did {name} write?|Copy the note of {name}.|Quote "
                     "{name}.>",
                **slots)  # fmt: skip
    follow_ups = (
        (
            _say(rng, "<And what did {other} write?|Now quote {other}.>", **slots),
            _say(rng, "{other} wrote: {rest}", **slots),
        ),
        (
            _say(rng, "<Who wrote the other note?|Who else wrote a note?>"),
            _say(rng, "The other note is <by|from> {other}.", **slots),
        ),
    )
    return Scene(user, _say(rng, "{name} wrote: {quote}", **slots), follow_ups)


# stem and humanities ------------------------------------------------------------------------------------------------


def _simpler(rng: Random, slots: dict[str, str]) -> tuple[tuple[str, str], ...]:
    """Give the follow-ups on an explained term."""
    return (
        (_say(rng, "<Explain it to a child.|Now explain it to a child.|Rewrite it for a child.>"),
         _say(rng, "<Think of it like this|It is simple>: {child}. <That is all!|That is {term}.>", **slots)),
        (_say(rng, "<Now say it shorter.|Make it shorter.|Say it in one sentence.>"),
         _say(rng, "<In short|In one sentence>: {cap} is {what}.", **slots)),
        (_say(rng, "<Give me an example.|Do you have an example?|What is a good example?>"),
         _say(rng, "<A good example of {term} is|One example of {term} is|For {term} think of> {example}.", **slots)),
        (_say(rng, "<Why is it important?|Why does it matter?|Why should I care?>"),
         _say(rng, "<{cap} matters because|{cap} is important because> {why}<.|. Just think of {example}.>", **slots)),
    )  # fmt: skip


def _term_slots(term: str, facts: tuple[str, ...]) -> dict[str, str]:
    """Give the slots of one explained term."""
    what, example, why, child = facts
    return {"term": term, "cap": _capital(term), "what": what, "example": example, "why": why, "child": child}


def _explained(rng: Random, table: Mapping[str, tuple[str, ...]]) -> Scene:
    """Give a question about one term of `table`."""
    term, facts = _key(rng, table)
    slots = _term_slots(term, facts) | {"name": rng.choice(lexicon.NAMES), "tone": rng.choice(lexicon.TONES)}
    user = _say(rng, "<Explain {term} to {name}.|{name} asks: What is {term}?|Explain {term} in a {tone} way.|"
                     "What is {term}, and why does it matter? Answer {name}.|Tell {name} about {term}.>",
                **slots)  # fmt: skip
    answer = _say(
        rng,
        "{cap} is {what}. <A good example is|One example is|Think of> {example}. "
        "<It matters because|It is important because|We care about it because> {why}.",
        **slots,
    )
    return Scene(user, answer, _simpler(rng, slots))


def _compared(rng: Random, table: Mapping[str, tuple[str, ...]]) -> Scene:
    """Give a question about the difference of two terms of `table`."""
    one, two = rng.sample(list(table), 2)
    slots = {"one": one, "two": two, "cap": _capital(one), "what": table[one][0], "other": table[two][0]}
    slots |= {"example": table[one][1], "sample": table[two][1]}
    user = _say(rng, "<Compare {one} and {two}.|How does {one} differ from {two}?|What is the difference between "
                     "{one} and {two}?>", **slots)  # fmt: skip
    answer = _say(rng, "{cap} is {what}, <while|but> {two} is {other}. <An example of the first is|For the first "
                       "think of> {example}.", **slots)  # fmt: skip
    follow_ups = (
        (_say(rng, "<And an example of the second?|Give me an example of the second.>"),
         _say(rng, "<A good example of {two} is|One example of {two} is|For {two} think of> {sample}.", **slots)),
        (_say(rng, "<Say only what the first is.|What is the first again?>"), _say(rng, "{cap} is {what}.", **slots)),
        (_say(rng, "<Explain the first to a child.|Tell a child about the first.>"),
         _say(rng, "<Think of it like this|It is simple>: {child}.", child=table[one][3])),
    )  # fmt: skip
    return Scene(user, answer, follow_ups)


def _stem_library(rng: Random) -> Scene:
    functions = library_text.math_functions()
    if not functions:
        return _explained(rng, lexicon.STEM)
    asked = (
        "<What does {dotted} compute?|Which number does {dotted} give?|{name} wants to know what {dotted} computes.|"
        "Explain the Python function {dotted}.>"
    )
    return _library(rng, functions, asked)


def _stem(rng: Random) -> Scene:
    return _explained(rng, lexicon.STEM)


def _stem_compared(rng: Random) -> Scene:
    return _compared(rng, lexicon.STEM)


def _humanities(rng: Random) -> Scene:
    return _explained(rng, lexicon.HUMANITIES)


def _humanities_compared(rng: Random) -> Scene:
    return _compared(rng, lexicon.HUMANITIES)


_PATTERNS: dict[str, tuple[Pattern, ...]] = {
    "writing": (_letter, _poem, _travel, _advert),
    "roleplay": (_job, _character),
    "reasoning": (_order, _moved, _syllogism, _weekday),
    "math": (_gain, _loss, _price, _rectangle),
    "coding": (_function, _function, _code_library),
    "extraction": (_purchase, _meeting, _quote),
    "stem": (_stem, _stem_compared, _stem_library),
    "humanities": (_humanities, _humanities_compared),
}


def is_held_out(first_turn: str) -> bool:
    """Tell whether a conversation that opens with `first_turn` is set apart for `questions`."""
    return hashlib.sha256(first_turn.encode()).digest()[0] % 8 == _HELD_OUT_EIGHTH


def _scene(rng: Random, pattern: Pattern, held_out: bool) -> Scene:
    """Draw from `pattern` until a scene lies on the wanted side of the held-out split."""
    for _ in range(_ATTEMPTS):
        scene = pattern(rng)
        if is_held_out(scene.user) == held_out:
            return scene
    raise RuntimeError(f"{pattern.__name__} has no scene with held_out={held_out}")


def _exchanges(rng: Random, scene: Scene, turns: int) -> list[tuple[str, str]]:
    """Give the opening exchange of `scene` and `turns - 1` different follow-ups."""
    return [(scene.user, scene.answer), *rng.sample(scene.follow_ups, min(turns - 1, len(scene.follow_ups)))]


def training_conversations(num: int, seed: int) -> Iterator[list[dict[str, str]]]:
    """Yield `num` conversations of one to three answered turns, the categories in rotation.

    Each is a list of {"role", "content"} messages; a few start with a system message. No held-out opening occurs.
    """
    rng = Random(f"fledge training {seed}")
    for index in range(num):
        pattern = rng.choice(_PATTERNS[CATEGORIES[index % len(CATEGORIES)]])
        exchanges = _exchanges(rng, _scene(rng, pattern, held_out=False), rng.choice((1, 2, 2, 3)))
        messages = [{"role": "system", "content": rng.choice(_SYSTEM_MESSAGES)}] if rng.random() < _SYSTEM_SHARE else []
        for user, answer in exchanges:
            messages += [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
        yield messages


def _fresh_turns(
    rng: Random, patterns: tuple[Pattern, ...], turns: int, held_out: bool, taken: set[tuple[str, ...]]
) -> list[str]:
    """Draw the user turns of a scene of one of `patterns` that are not in `taken` yet and add them there.

    Held-out scenes count as taken with their opening turn alone.
    """
    for _ in range(_ATTEMPTS):
        drawn = [user for user, _ in _exchanges(rng, _scene(rng, rng.choice(patterns), held_out), turns)]
        key = tuple(drawn[:1] if held_out else drawn)
        if key not in taken:
            taken.add(key)
            return drawn
    raise ValueError(f"the corpus is used up after {len(taken)} different prompts: ask for fewer")


def prompts(num: int, seed: int) -> list[dict]:
    """Give `num` different prompts {"id", "category", "turns"} of one or two user turns, the categories in rotation.

    No held-out opening occurs. Raises ValueError if the grammar has no `num` different prompts.
    """
    rng = Random(f"fledge prompts {seed}")
    taken: set[tuple[str, ...]] = set()
    drawn: list[dict[str, Any]] = []
    for index in range(num):
        category = CATEGORIES[index % len(CATEGORIES)]
        turns = _fresh_turns(rng, _PATTERNS[category], rng.choice((1, 2)), False, taken)
        drawn.append({"id": f"{category}-{seed}-{index:06d}", "category": category, "turns": turns})
    return drawn


def questions() -> list[dict]:
    """Give the 80 held-out questions {"question_id", "category", "turns"} of two turns each, ten a category."""
    rng = Random("fledge questions")
    taken: set[tuple[str, ...]] = set()
    drawn: list[dict[str, Any]] = []
    for category in CATEGORIES:
        patterns = sorted(set(_PATTERNS[category]), key=_PATTERNS[category].index)
        for index in range(_QUESTIONS_PER_CATEGORY):
            turns = _fresh_turns(rng, (patterns[index % len(patterns)],), 2, True, taken)
            drawn.append({"question_id": _FIRST_QUESTION_ID + len(drawn), "category": category, "turns": turns})
    return drawn

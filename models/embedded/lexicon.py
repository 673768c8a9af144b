"""Word lists and small facts that fill the slots of the embedded verifier's corpus."""

from __future__ import annotations

NAMES: tuple[str, ...] = (
    "Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Iris", "Jack", "Kate", "Leo",
    "Maria", "Noah", "Olga", "Paul", "Rosa", "Sam", "Tina", "Victor",
)  # fmt: skip

TONES: tuple[str, ...] = ("friendly", "formal", "cheerful", "warm", "polite", "funny", "calm", "proud")

DAYS: tuple[str, ...] = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

# Place: a sight and a dish.
PLACES: dict[str, tuple[str, str]] = {
    "Lisbon": ("the old yellow trams", "warm custard tarts"),
    "Kyoto": ("the quiet temples", "green tea cakes"),
    "Oslo": ("the long blue fjord", "fresh salmon soup"),
    "Cairo": ("the great pyramids", "warm bread with beans"),
    "Lima": ("the cliffs above the ocean", "fish with lime"),
    "Venice": ("the narrow canals", "rice with peas"),
    "Nairobi": ("the wide park with lions", "corn with greens"),
    "Vienna": ("the grand concert halls", "rich chocolate cake"),
    "Istanbul": ("the blue mosque", "sweet honey pastry"),
    "Mumbai": ("the busy road by the sea", "spicy potato buns"),
    "Sydney": ("the white opera house", "grilled prawns"),
    "Athens": ("the marble temple on the hill", "salad with white cheese"),
    "Dublin": ("the old library", "thick potato stew"),
    "Havana": ("the colourful old cars", "black beans with rice"),
    "Prague": ("the old stone bridge", "soft dumplings"),
    "Quebec": ("the high city walls", "pancakes with maple syrup"),
}

# Event: what was good about it.
EVENTS: dict[str, str] = {
    "wedding": "the music and the long dance",
    "concert": "the songs and the happy crowd",
    "book fair": "the old books and the kind readers",
    "football match": "the last goal and the loud fans",
    "garden party": "the flowers and the cold lemonade",
    "school play": "the costumes and the brave actors",
    "birthday party": "the candles and the huge cake",
    "museum visit": "the paintings and the quiet rooms",
    "cooking class": "the fresh bread and the good jokes",
    "boat trip": "the waves and the clear sky",
}

# Subject of a poem: two adjectives, what it does, what it leaves behind.
SUBJECTS: dict[str, tuple[str, str, str, str]] = {
    "sea": ("deep", "blue", "rolls to the shore", "a taste of salt"),
    "rain": ("soft", "grey", "taps on the roof", "a silver street"),
    "moon": ("round", "pale", "climbs over the hill", "a path of light"),
    "forest": ("green", "tall", "hums in the wind", "a smell of pine"),
    "river": ("quick", "cold", "runs through the town", "a song of stones"),
    "winter": ("white", "long", "sleeps on the field", "a breath of ice"),
    "garden": ("bright", "small", "grows by the wall", "a rose for you"),
    "city": ("loud", "wide", "shines in the dark", "a thousand lamps"),
    "cat": ("sly", "sleepy", "sits on the sill", "a warm round chair"),
    "train": ("fast", "red", "sings on the rails", "a cloud of dust"),
    "mountain": ("high", "old", "looks over the land", "a crown of snow"),
    "summer": ("golden", "slow", "dances in the grass", "a bowl of fruit"),
}

# Product: what it is good for, its best feature.
PRODUCTS: dict[str, tuple[str, str]] = {
    "umbrella": ("rainy walks", "opens with one soft click"),
    "backpack": ("long trips", "has nine useful pockets"),
    "lamp": ("late reading", "gives a warm and steady light"),
    "kettle": ("slow mornings", "boils water in two minutes"),
    "bicycle": ("short rides", "has very quiet gears"),
    "notebook": ("good ideas", "lies flat on every page"),
    "jacket": ("cold evenings", "keeps the wind outside"),
    "watch": ("busy days", "runs for a year without a new battery"),
    "blanket": ("lazy Sundays", "stays soft after every wash"),
    "radio": ("small kitchens", "finds every station by itself"),
}

# Profession: workplace, what it does, its tool, what it offers, its hardest moment.
JOBS: dict[str, tuple[str, str, str, str, str]] = {
    "baker": ("bakery", "bake bread before sunrise", "oven", "a warm roll", "the early mornings"),
    "sailor": ("harbour", "sail along the coast", "compass", "a trip on my boat", "the storms at night"),
    "doctor": ("clinic", "look after sick people", "stethoscope", "some good advice", "the long night shifts"),
    "teacher": ("school", "explain new ideas to children", "blackboard", "a short lesson", "the noisy afternoons"),
    "gardener": ("garden", "plant flowers and trees", "spade", "a fresh bunch of roses", "the dry summers"),
    "pilot": ("airport", "fly planes over the clouds", "headset", "a seat by the window", "the thick fog"),
    "librarian": ("library", "find the right book for everyone", "catalogue", "a good novel", "the lost books"),
    "chef": ("kitchen", "cook dinner for fifty guests", "sharp knife", "a bowl of soup", "the busy evenings"),
    "tailor": ("workshop", "sew coats and shirts", "needle", "a new coat", "the tiny buttons"),
    "farmer": ("farm", "grow corn and feed the cows", "tractor", "a glass of fresh milk", "the cold winters"),
    "detective": ("office", "solve strange cases", "magnifying glass", "a cup of coffee", "the missing clues"),
    "astronaut": ("space station", "watch the blue Earth", "space suit", "a look at the stars", "the long silence"),
    "painter": ("studio", "paint people and landscapes", "brush", "a small portrait", "the empty canvas"),
    "musician": ("theatre", "play songs for the crowd", "violin", "a slow waltz", "the first note"),
    "blacksmith": ("forge", "shape hot iron", "hammer", "a strong horseshoe", "the heat of the fire"),
    "fisher": ("little hut by the lake", "catch fish at dawn", "net", "a fresh trout", "the empty nets"),
}  # fmt: skip

# Character: where it lives, what it did today, what it dreams of, what it says.
CHARACTERS: dict[str, tuple[str, str, str, str]] = {
    "dragon": ("in a cave full of gold", "counted my coins twice", "a friend who is not afraid of smoke", "Roar"),
    "robot": ("in a bright laboratory", "oiled my joints and sorted screws", "one day without rain", "Beep"),
    "old tree": ("at the edge of the wood", "held three nests in my arms", "another hundred springs", "Hush"),
    "ghost": ("in the attic of a castle", "rattled my chains at noon", "a visitor who wants to chat", "Boo"),
    "pirate": ("on a ship with black sails", "searched for a treasure map", "an island full of silver", "Ahoy"),
    "lighthouse": ("on a rock in the sea", "guided nine ships home", "a night without fog", "Flash"),
    "snowman": ("in front of the school", "lost half of my carrot nose", "a winter that never ends", "Brrr"),
    "wizard": ("in a tower of stone", "turned a frog into a teapot", "a spell that cleans the dishes", "Behold"),
    "parrot": ("in a cage by the window", "repeated every word I heard", "a nut the size of a house", "Squawk"),
    "knight": ("in a castle on the hill", "polished my shield and fed my horse", "a peaceful kingdom", "Hail"),
}

ITEMS: tuple[str, ...] = (
    "apples", "pencils", "stamps", "coins", "books", "marbles", "shells", "cards", "eggs", "tickets", "flowers",
    "buttons",
)  # fmt: skip

GOODS: tuple[str, ...] = (
    "lamp", "chair", "bicycle", "clock", "carpet", "camera", "guitar", "mirror", "teapot", "painting", "radio", "table",
)  # fmt: skip

CONTAINERS: tuple[str, ...] = ("box", "drawer", "basket", "cupboard", "bag", "chest", "jar", "suitcase")

SMALL_THINGS: tuple[str, ...] = ("key", "ring", "letter", "ball", "coin", "spoon", "watch", "map", "candle", "cookie")

# Comparative, superlative, opposite superlative.
ORDERS: tuple[tuple[str, str, str], ...] = (
    ("taller", "tallest", "shortest"),
    ("older", "oldest", "youngest"),
    ("faster", "fastest", "slowest"),
    ("stronger", "strongest", "weakest"),
    ("richer", "richest", "poorest"),
)

# Kind (plural), class (plural), what every member of the class does.
KINDS: tuple[tuple[str, str, str, str], ...] = (
    ("sparrow", "sparrows", "birds", "have feathers"),
    ("salmon", "salmon", "fish", "live in water"),
    ("rose", "roses", "plants", "need light"),
    ("beetle", "beetles", "insects", "have six legs"),
    ("whale", "whales", "mammals", "breathe air"),
    ("square", "squares", "rectangles", "have four corners"),
    ("violin", "violins", "instruments", "make sounds"),
    ("planet", "planets", "worlds", "move around a star"),
)

CLUBS: tuple[str, ...] = (
    "chess club", "film club", "garden club", "book club", "running group", "cooking class", "photo club", "city choir",
)  # fmt: skip

ROOMS: tuple[str, ...] = ("blue room", "main hall", "library", "old kitchen", "gym", "small theatre", "cellar", "yard")

HOURS: tuple[str, ...] = ("nine", "ten", "eleven", "two", "three", "four", "five", "six", "seven", "eight")

FOODS: tuple[str, ...] = ("cake", "bread", "cheese", "soup", "fruit", "tea", "cookies", "salad", "juice", "olives")

COLOURS: tuple[str, ...] = ("red", "blue", "green", "yellow", "black", "white", "brown", "grey")

# Term: what it is, an example, why it matters, in a child's words.
STEM: dict[str, tuple[str, str, str, str]] = {
    "gravity": (
        "the force that pulls masses toward each other", "an apple that falls from a tree",
        "it keeps the planets near the sun", "the Earth holds you so that you do not float away",
    ),
    "photosynthesis": (
        "the process by which plants turn light, water and air into sugar", "a leaf that grows in the sun",
        "it makes the oxygen that we breathe", "plants cook their own food with sunlight",
    ),
    "friction": (
        "the force that slows down two surfaces that rub together", "a brake that stops a bicycle",
        "it lets us walk without slipping", "rough things do not slide easily",
    ),
    "evaporation": (
        "the change of a liquid into a gas at its surface", "a puddle that dries after the rain",
        "it brings water back into the air", "water slowly turns into air that you cannot see",
    ),
    "an atom": (
        "the smallest part of a chemical element", "a single piece of helium in a balloon",
        "everything around us is built from it", "it is a tiny brick that makes all things",
    ),
    "a cell": (
        "the smallest living part of an organism", "a red blood cell that carries oxygen",
        "every plant and animal is made of it", "it is a tiny room where life works",
    ),
    "electricity": (
        "the flow of charged particles through a wire", "a lamp that shines when you press a switch",
        "it gives power to our machines", "tiny sparks run through a wire and do work",
    ),
    "magnetism": (
        "the force by which magnets attract iron", "a compass needle that points north",
        "it turns motors and stores data", "some metals like to hug each other",
    ),
    "evolution": (
        "the slow change of living things over many generations", "a beak that grows longer to reach food",
        "it explains why there are so many species", "animals change a little with every family",
    ),
    "an orbit": (
        "the curved path of one body around another", "the moon that travels around the Earth",
        "it keeps satellites above us", "one ball runs in circles around a bigger ball",
    ),
    "a prime number": (
        "a whole number above one that only one and itself divide", "the number seven",
        "it protects secret messages", "you cannot share it fairly into equal groups",
    ),
    "an ecosystem": (
        "a community of living things and the place they share", "a pond with frogs, plants and insects",
        "it keeps food and water in balance", "plants and animals live together like neighbours",
    ),
    "a vaccine": (
        "a medicine that teaches the body to fight a disease", "a shot against measles",
        "it stops an illness before it starts", "it shows your body a picture of the germ",
    ),
    "an algorithm": (
        "a list of clear steps that solves a problem", "a recipe that sorts names by letter",
        "every computer program follows one", "it is a recipe for a machine",
    ),
    "density": (
        "the mass of a thing divided by its volume", "a stone that sinks while wood floats",
        "it decides what floats and what sinks", "heavy things can hide in a small box",
    ),
    "a volcano": (
        "an opening in the ground where hot rock comes out", "a mountain that throws ash into the sky",
        "it builds new land and rich soil", "it is a mountain that burps fire",
    ),
}  # fmt: skip

# Term: what it was or is, an example or a person, why it matters, in a child's words.
HUMANITIES: dict[str, tuple[str, str, str, str]] = {
    "the Renaissance": (
        "a time when art and learning bloomed again in Europe", "the paintings of Leonardo da Vinci",
        "it changed how people saw the world", "people began to paint and ask questions again",
    ),
    "democracy": (
        "a form of government in which the people decide by voting", "an election for a new parliament",
        "it gives every citizen a voice", "everyone raises a hand and the most hands win",
    ),
    "the printing press": (
        "a machine that prints many copies of a page", "the Bible that Gutenberg printed",
        "it spread books and ideas quickly", "a big stamp that makes many books",
    ),
    "the Silk Road": (
        "a net of trade routes between China and Europe", "merchants who carried silk and spices on camels",
        "it joined distant cultures", "a very long road where people swapped nice things",
    ),
    "stoicism": (
        "a school of thought that teaches calm and self-control", "the notes of the emperor Marcus Aurelius",
        "it helps people to accept what they cannot change", "stay calm when things go wrong",
    ),
    "the Industrial Revolution": (
        "the time when machines and factories replaced hand work", "the steam engine of James Watt",
        "it moved people from farms to cities", "machines began to do the hard work",
    ),
    "impressionism": (
        "a style of painting that catches light and a brief moment", "the water lilies of Claude Monet",
        "it opened the door to modern art", "paint quickly what you see before the light goes",
    ),
    "a myth": (
        "an old story about gods, heroes and the start of things", "the story of Icarus who flew too near the sun",
        "it shows what a people feared and loved", "a very old tale about heroes and monsters",
    ),
    "a sonnet": (
        "a poem of fourteen lines with a fixed rhyme", "a love poem by Shakespeare",
        "it shaped poetry for centuries", "a song with fourteen short lines",
    ),
    "the Roman Empire": (
        "a huge state that ruled the lands around the Mediterranean", "the roads and baths that still stand today",
        "it left us laws and languages", "a very big country with strong soldiers and long roads",
    ),
    "inflation": (
        "a steady rise of prices over time", "bread that costs more every year",
        "it lowers the value of savings", "the same coin buys fewer sweets",
    ),
    "ethics": (
        "the study of what is right and wrong", "the question whether a lie can be good",
        "it guides how we treat others", "thinking about how to be fair and kind",
    ),
    "a constitution": (
        "a set of basic laws for a state", "the text that limits a president",
        "it protects people from unfair rulers", "the most important rules of a country",
    ),
    "the Enlightenment": (
        "a time when thinkers trusted reason and science", "the essays of Voltaire",
        "it inspired modern rights", "people decided to think for themselves",
    ),
    "trade": (
        "the exchange of goods between people", "a farmer who swaps wheat for tools",
        "it lets everyone do what they do best", "I give you my apple and you give me your pear",
    ),
    "archaeology": (
        "the study of the past through things found in the ground", "a broken pot from an ancient house",
        "it tells us how people lived without writing", "digging for old treasures that tell a story",
    ),
}  # fmt: skip

# Task: loop body with {a} the argument, return annotation, what it does, an assertion with {f}.
CODE_TASKS: dict[str, tuple[str, str, str, str]] = {
    "returns the sum of a list": (
        "    total = 0\n    for item in {a}:\n        total = total + item\n    return total",
        "int", "adds every item to a running total", "{f}([1, 2, 3]) == 6",
    ),
    "returns the largest item of a list": (
        "    best = {a}[0]\n    for item in {a}:\n        if item > best:\n            best = item\n    return best",
        "int", "keeps the best item that it has seen", "{f}([1, 5, 3]) == 5",
    ),
    "returns the smallest item of a list": (
        "    best = {a}[0]\n    for item in {a}:\n        if item < best:\n            best = item\n    return best",
        "int", "keeps the smallest item that it has seen", "{f}([4, 2, 3]) == 2",
    ),
    "counts the items of a list": (
        "    count = 0\n    for item in {a}:\n        count = count + 1\n    return count",
        "int", "adds one for every item", "{f}([7, 8, 9]) == 3",
    ),
    "returns a list in reverse order": (
        "    result = []\n    for item in {a}:\n        result.insert(0, item)\n    return result",
        "list[int]", "puts every item in front of the others", "{f}([1, 2]) == [2, 1]",
    ),
    "returns only the even numbers of a list": (
        "    result = []\n    for item in {a}:\n        if item % 2 == 0:\n            result.append(item)\n    "
        "return result",
        "list[int]", "keeps an item if two divides it", "{f}([1, 2, 4]) == [2, 4]",
    ),
    "returns the square of every number in a list": (
        "    result = []\n    for item in {a}:\n        result.append(item * item)\n    return result",
        "list[int]", "multiplies every item by itself", "{f}([1, 2, 3]) == [1, 4, 9]",
    ),
    "returns the average of a list": (
        "    total = sum({a})\n    return total / len({a})",
        "float", "divides the total by the number of items", "{f}([2, 4]) == 3",
    ),
    "removes the duplicates from a list": (
        "    result = []\n    for item in {a}:\n        if item not in result:\n            "
        "result.append(item)\n    return result",
        "list[int]", "keeps only the items that are new", "{f}([1, 1, 2]) == [1, 2]",
    ),
    "checks if a list is sorted": (
        "    return {a} == sorted({a})",
        "bool", "compares the list with its sorted copy", "{f}([1, 2, 3])",
    ),
}  # fmt: skip

FUNCTION_NAMES: tuple[str, ...] = (
    "compute", "solve", "helper", "process", "handle", "evaluate", "collect", "convert", "work", "check", "run", "scan",
)  # fmt: skip

ARGUMENT_NAMES: tuple[str, ...] = ("values", "items", "numbers", "data", "rows", "entries", "parts", "scores")

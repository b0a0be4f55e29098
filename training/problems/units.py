"""Units: words that may follow a number without changing it. Any other word makes the number unreadable.

The list is closed on purpose: an unknown word may be a multiplier (lakh, gross), which changes the number before it.
"""

from __future__ import annotations

_SYMBOLS = """
m cm mm km nm in ft yd mi g kg mg lb lbs oz t s h hr hrs min mins sec secs ms ns l L ml mL dl gal qt pt tbsp tsp
A V W N J C F Pa Hz kHz MHz GHz kW kWh kJ cal kcal mol mmol km/h kph mph rpm px dpi MB GB KB TB bit bits byte bytes
USD EUR GBP CNY INR pts pct deg rad sq cu am pm
"""
_MEASURES = """
percent degree radian meter metre centimeter centimetre millimeter millimetre kilometer kilometre inch inche foot feet
yard mile acre hectare gram kilogram milligram pound ounce ton tonne liter litre milliliter millilitre gallon quart
pint cup tablespoon teaspoon second minute hour day week month year decade century fortnight night morning dollar cent
euro penny pence peso yen yuan rupee nickel dime quid buck calorie watt kilowatt volt ampere newton joule kelvin
celsius fahrenheit mole hertz point mark grade unit time step lap mph rpm credit
"""
_THINGS = """
item object thing piece part slice portion serving set group team class section row column line page chapter word
letter character sentence paragraph question problem answer test exam lesson course essay book notebook magazine
newspaper story article paper sheet card stamp photo picture painting poster sticker badge coin bill note ticket
coupon gift present prize toy doll game puzzle ball bat marble bead balloon kite block brick tile box bag pack package
packet bundle case crate carton jar can bottle glass mug plate bowl dish tray tub basket bucket barrel sack pot pan
spoon fork knife lid egg apple orange banana pear peach plum cherry grape lemon lime mango melon watermelon pineapple
strawberry berry fruit potato tomato carrot onion cabbage pumpkin bean pea corn vegetable nut almond seed plant flower
rose tulip petal tree bush leaf branch loaf bread sandwich burger pizza cake cupcake cookie brownie pie donut muffin
bagel pastry candy chocolate lollipop gum sweet ice scoop cone snack meal dinner lunch breakfast drink juice soda
coffee tea milk water person people man men woman women child children kid boy girl baby adult student pupil classmate
teacher friend guest visitor customer client worker employee passenger player member patient resident voter
participant family household couple animal dog cat puppy kitten fish bird chicken hen duck goose turkey cow sheep goat
pig horse rabbit mouse hamster bee ant bug insect spider snail frog turtle snake lion tiger bear monkey elephant shark
whale crab shrimp car truck bus van bike bicycle motorcycle boat ship train plane vehicle wheel tire seat chair table
desk bed sofa shelf lamp door window wall room house home apartment building floor store shop school office farm
garden field park pool city town country road street bridge shirt pants sock shoe boot hat coat jacket dress skirt
glove scarf ring necklace bracelet jewel diamond pen pencil crayon marker eraser ruler brush string rope chain nail
screw bolt stick stone rock shell log stair ladder step trip ride flight tour visit call message email video song
movie show episode concert match round goal run win loss vote shift job task order sale purchase payment fee share
stock sample cell atom molecule electron proton bond edge vertex vertice side face angle triangle square circle digit
number factor divisor multiple solution root term element node pixel star planet roll spool skein yarn thread button
bulb battery phone computer laptop screen app file bandage medal trophy candle firework flashlight tent backpack
"""
_LINKS = """
per of a an the each every in for more less fewer left remaining total altogether old long tall high wide deep away ago
later early late square cubic cubed extra additional new old small medium large big red blue green yellow white black
pink purple brown golden silver full empty different other
"""
_SINGULARS = frozenset((_MEASURES + _THINGS).split()) - {"square"}
_EXACT = frozenset((_SYMBOLS + _LINKS).split())


def is_unit_word(word: str) -> bool:
    """Whether a word after a number is known to leave it as it is.

    Example:
        >>> is_unit_word("apples"), is_unit_word("km"), is_unit_word("lakh")
        (True, True, False)
    """
    if word in _EXACT or (word.lower() in _EXACT and len(word) > 2):
        return True
    plural = word.lower()
    forms = {plural, plural.removesuffix("s"), plural.removesuffix("es"), plural.removesuffix("ves") + "f"}
    if plural.endswith("ies"):
        forms.add(plural.removesuffix("ies") + "y")
    return not forms.isdisjoint(_SINGULARS)

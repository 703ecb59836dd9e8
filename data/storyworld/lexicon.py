"""The lexicon of the story world: characters, things, places, and the relations between them.

`build_tables` builds the tables that `grammar.World` draws from. Entities are separated by newlines or commas; * marks a plural
(berries*), ~ a mass noun (honey~).
"""

from data.storyworld.nodes import Entity, Table, with_article

# kind | past of how it moves | how it moves | its cry | its home | what it likes to eat
KINDS = """
girl | ran | run | Yay | house | apple, pancake, strawberries*, cookies*, noodles*, soup~, cheese~, grapes*, peach, cupcake, waffle, plum, toast~, pizza~, raisins*, muffin, pretzel, rice~, omelet, jelly~, pudding~
boy | ran | run | Hooray | house | apple, pancake, strawberries*, cookies*, noodles*, soup~, cheese~, grapes*, peach, cupcake, waffle, plum, toast~, pizza~, raisins*, muffin, pretzel, rice~, omelet, jelly~, pudding~
dog | ran | run | Woof | kennel | sausage, meatballs*, biscuit, ham~, stew~, gravy~, roast beef~, liver pie, soup bones*
puppy | scampered | scamper | Yip | basket | biscuit, sausage, milk~, chicken~, bacon~, crusts*, porridge~
cat | crept | creep | Meow | cottage | fish, milk~, cream~, tuna~, sardines*, custard~, herring, prawns*
kitten | skipped | skip | Mew | barn | milk~, cream~, fish, butter~
rabbit | hopped | hop | Oh my | burrow | carrot, lettuce~, clover~, radish, turnip, cabbage, parsley~, celery~, kale~
bear | stomped | stomp | Grr | cave | honey~, berries*, salmon~, nuts*, jam~, pears*, trout~
fox | trotted | trot | Yap | den | grapes*, eggs*, berries*, pie, plums*, mushrooms*, cheese~
mouse | scurried | scurry | Squeak | hole | cheese~, crumbs*, corn~, seeds*, cracker, bacon~, oats*, walnut
frog | leaped | leap | Ribbit | pond | worms*, beetle soup~, pond pudding~, algae cake~, gnats*, flies*
duck | waddled | waddle | Quack | nest | bread~, peas*, oats*, corn~, lettuce~, pondweed~, barley~
pig | trotted | trot | Oink | barn | pumpkin, acorns*, potatoes*, corn~, pears*
lamb | skipped | skip | Baa | barn | clover~, grass~, daisies*, hay~
pony | galloped | gallop | Neigh | stable | hay~, carrot, sugar~, apple
squirrel | scampered | scamper | Chirr | tree house | acorns*, nuts*, seeds*, pine cone
hedgehog | shuffled | shuffle | Snuffle | leaf house | worms*, berries*, mushroom, melon
turtle | plodded | plod | Hmm | shell house | lettuce~, melon, dandelions*, strawberries*
owl | flew | fly | Hoo | oak tree | blueberries*, seed cake~, pie
robin | flew | fly | Tweet | nest | cherries*, worms*, crumbs*, seeds*
dragon | flew | fly | Rawr | cave | hot peppers*, chili~, burnt toast~, marshmallows*
monkey | swung | swing | Ooh ooh | tree house | banana, mango, coconut, figs*
elephant | marched | march | Toot | grassy home | peanuts*, melon, banana, hay~
lion | strode | stride | Roar | den | stew~, ham~, sausage
penguin | waddled | waddle | Honk | igloo | fish, shrimp~, ice cream~
goat | trotted | trot | Bleat | shed | cabbage, thistles*, turnip, hay~
beaver | paddled | paddle | Slap | lodge | bark~, twigs*, water lilies*
mole | shuffled | shuffle | Sniff | tunnel | worms*, roots*, potatoes*, radish
"""
FLYING = "owl robin dragon"
WILD = "rabbit bear fox mouse frog squirrel hedgehog turtle owl robin mole beaver"  # animals of the wood and the pond
SMALL = "mouse frog robin squirrel mole hedgehog kitten"
GIANT = "bear lion elephant dragon"
BIG = "bear pony elephant lion dragon"

NAMES = {
    "girl": "Lily Mia Anna Lucy Sara Emma Zoe Ella Nora Ruby Molly Amy Daisy Rosie Clara Ivy Jane Kate Maya Nina Polly Sophie Tess "
    "Wendy Hannah Eva Grace Holly Julia Laura Megan Alma Betty Cora Dora Greta Hazel Iris June Leah Ada Bea Celia Edith Freya Gwen Heidi Ines Judy Katie Lena Mabel Paula Rita Sally Tina Vera Wanda Yara Fiona Elsa",
    "boy": "Tim Tom Ben Max Sam Jack Leo Noah Adam Billy Finn Oscar Peter Henry Luke Toby Ned Owen Paul Ryan Theo Victor Will Zack "
    "Eli Fred George Hugo Ian Jacob Kevin Liam Martin Oliver Pablo Ray Simon Tony Walter Alex Aaron Bob Carl Dan Emil Felix Gary Hank Ivan Jim Ken Lars Mark Nick Otis Phil Steve Ted Vince Wayne Yusuf Andy Colin",
    "she": "Bella Coco Dolly Fifi Ginger Honey Kiki Lulu Mimi Nala Olive Pearl Rosa Suki Tilly Poppy Willow Penny Maple Dot Clover "
    "Fern Lola Peach Biscuit Nutmeg Trixie Velvet Cleo Bonnie Amber Birdie Candy Dixie Echo Flora Goldie Heather Jewel Kitty Lotte Misty Nelly Opal Pixie Queenie Rainy Sunny Tulip",
    "he": "Bingo Buddy Chip Duke Fuzzy Gus Hoppy Jasper Koko Lucky Milo Nibbles Otto Pip Rusty Scout Teddy Waldo Ziggy Barney Bramble "
    "Mango Pepper Sparky Tango Tucker Whisker Yogi Archie Bruno Alfie Banjo Bongo Cosmo Digger Elmo Fergus Gizmo Hobbes Iggy Jumbo Kipper Loki Monty Nemo Ollie Patch Quincy Rocky Snappy Tiger",
}

FAMILY = "mom Mom she her her, dad Dad he him his, grandma Grandma she her her, grandpa Grandpa he him his"

# thing | what one can do with it, with "it" or "them" for the thing; later sentences come back to it
TOYS = """
ball | bounce it on the path; play catch with it; kick it over the hedge; roll it down the hill
doll | give it a tea party; sing it to sleep; brush its long hair; build it a tiny bed
kite | fly it high in the sky; make it dance in the wind; run with it along the shore
drum | play a loud march on it; beat it in the parade; tap a song on it
toy boat | sail it on the water; race it down the stream; fill it with brave little sailors
toy train | push it around the room; pull it through a tunnel; load it with tiny logs
teddy bear | hug it at night; tell it secrets; carry it everywhere
picture book | read it before bed; look at it under a tree; learn the names of all the stars in it
hat | wear it in the sun; do magic tricks with it; look like a real farmer in it
scarf | keep warm in it; wave it like a flag; play pirates with it
whistle | blow it at the race; call all the others with it; copy the songs of the birds with it
puzzle | solve it on a rainy day; put it together with a friend; see the castle in it
robot | teach it to dance; make it beep; let it carry the cups
marble | roll it down a ramp; watch the colors in it; win a game with it
bell | ring it for dinner; hang it on the door; hear it jingle
lantern | light the dark path with it; read by it at night; send signals with it
basket | carry berries in it; fill it with flowers; take it to the picnic
umbrella | stay dry under it; dance with it in the rain; float it like a boat
blanket | snuggle under it; build a fort with it; spread it on the grass
paintbrush | paint a rainbow with it; make the old fence pretty with it; draw a whale with it
crown | play king and queen with it; wear it at the party; rule over the toys with it
puppet | put on a show with it; make it talk in a silly voice; make the baby laugh with it
bucket | build a sand castle with it; carry water in it; collect pebbles in it
flute | play a sweet tune on it; wake up the birds with it; join the band with it
trumpet | play in the band with it; blow a loud note on it; greet the morning with it
magnet | pick up pins with it; fish for nails with it; hang up a drawing with it
compass | find the north with it; go exploring with it; lead the way with it
ribbon | tie a bow with it; wrap a present with it; twirl it in the air
cape | be a hero in it; play wizard in it; swoosh around in it
scooter | race down the lane on it; ride it to school; zoom past the bakery on it
sled | slide down the snowy hill on it; pull it through the snow; ride it with a friend
wagon | pull it up the hill; haul pumpkins in it; give rides in it
skates* | glide over the ice in them; spin around in them; race in them
blocks* | build a tall tower with them; make a bridge with them; spell a word with them
crayons* | draw a purple cow with them; color the whole page with them; make a birthday card with them
boots* | jump in puddles in them; splash in the mud in them; walk through the stream in them
"""
ANIMAL_TOYS = """
feather | tickle a friend with it; write letters with it; put it in a cap
shiny button | watch it sparkle; use it as a plate; spin it like a top
cushion | sleep on it all winter; curl up on it; sit on it like a king
round pebble | skip it over the water; roll it along the path; keep it as a lucky charm
big leaf | hide under it in the rain; use it as a sail; fan a hot friend with it
seashell | listen to the sea in it; drink tea from it; wear it on a string
rope | swing on it; play tug with it; tie up the raft with it
bone | chew on it all day; bury it for later; show it to the whole street
stick | fetch it again and again; dig a deep hole with it; drum on a log with it
balls of yarn* | chase them across the floor; knit a sock with them; tangle them up
"""
TOYS_OF = {
    "child": "ball doll kite drum toy_boat toy_train teddy_bear picture_book hat scarf whistle puzzle robot marble lantern umbrella "
    "blanket paintbrush crown puppet bucket flute trumpet magnet compass cape scooter sled wagon skates blocks crayons boots",
    "pet": "ball bell blanket bone stick rope cushion ribbon basket hat",
    "wild": "feather shiny_button cushion round_pebble big_leaf seashell bell blanket lantern basket drum scarf flute umbrella",
    "big": "drum crown umbrella ball trumpet blanket bucket hat wagon cape",
}

# preposition place | hiding places | things to look at
PLACES = """
in park | under the bench, behind the slide, beside the swings, in the sandbox, under the picnic table, behind the kiosk, near the duck pond, beside the bike rack | the fountain, the pigeons, the tall statue, the rose beds, the joggers, the brass band
in garden | under the rose bush, behind the watering can, between the tomatoes, beside the gate, under the cabbage leaves, behind the shed, beside the bird bath, near the compost heap | the sunflowers, the bees, the pea vines, the hollyhocks, the gnome, the bean poles
in forest | inside a hollow log, under the ferns, behind a pine tree, beside the mossy stump, behind a fallen tree, under a heap of leaves, beside the anthill, near the hunter's hut | the old oaks, the woodpecker, the toadstools, the tall firs, the spider webs, the wild garlic
on beach | behind a sand dune, under the pier, between the rocks, beside a tide pool, inside a sand castle, under a beach towel, behind the ice cream stand, near the lifeguard | the waves, the gulls, the tiny crabs, the surfers, the jellyfish, the distant island
on farm | behind the tractor, in the haystack, beside the trough, under the cart, behind the silo, under the haywagon, near the pigsty, beside the hen house | the cows, the rooster, the windmill, the scarecrow, the piglets, the wheat fields
at market | under the fruit stand, behind the barrels, beside the fish seller, between the crates, behind the flower cart, under a pile of melons, near the spice seller, beside the scales | the bright stalls, the baker, the juggler, the cheese wheels, the pickle jars, the puppet stage
in meadow | in the long grass, under the daisies, beside the stream, behind the beehive, under a dock leaf, behind the hay bale, beside the molehill, near the old fence | the butterflies, the poppies, the grazing sheep, the buttercups, the skylarks, the swaying clover
by lake | among the reeds, under the dock, behind the canoe, beside the willow, under the jetty, behind the boathouse, on a flat rock, near the picnic spot | the swans, the dragonflies, the sailboats, the water lilies, the fishing boats, the mirrored mountains
in valley | beside the waterfall, under the stone bridge, behind the thorn bush, inside a cave, under a ledge, behind the ruins, near the old well, beside the goat path | the river, the wild horses, the echo, the vineyards, the rapids, the snowy peaks
on hill | behind the big rock, under the apple tree, beside the stone wall, in the heather, behind the bench, under the lookout, near the cairn, beside the gorse | the clouds, the village below, the hawks, the rainbow, the winding road, the kites
in orchard | under the ladder, between the baskets, behind the cider press, beside the plum tree, behind the wheelbarrow, under the pear tree, near the beehives, beside the crates | the blossoms, the ripe pears, the starlings, the pickers, the red apples, the wasps
in village | behind the bakery, beside the well, under the clock tower, in the alley, behind the town pump, under the market cross, near the stables, beside the inn | the chimney smoke, the post office, the blacksmith, the weathercock, the cobbler, the lace curtains
at playground | under the seesaw, behind the climbing frame, beside the drinking tap, in the tunnel, behind the ball wall, under the bouncy bridge, near the bins, beside the sandpit | the merry-go-round, the big kids, the chalk drawings, the zip line, the whirling tires, the toddlers
in barn | in the hay, behind the milk cans, under the ladder, beside the saddle, behind the feed sacks, under the old sleigh, near the lambs, beside the ladder rack | the swallows, the sleepy cow, the dusty beams, the cobwebs, the barn owl, the rusty plow
in desert | behind a cactus, under a flat stone, beside the camel, in the hot sand, under the palm tree, behind the tent, near the oasis, beside the dry well | the lizards, the red cliffs, the long shadows, the caravan, the mirage, the tumbleweeds
in jungle | under a giant leaf, behind the vines, beside the bamboo, between two roots, inside a hollow trunk, under the fig tree, near the swamp, beside the temple stones | the parrots, the orchids, the noisy toucans, the tree snakes, the hummingbirds, the steaming pools
at zoo | beside the bear cage, under the ticket booth, behind the snack bar, near the seals, behind the aquarium, under the big map, near the camels, beside the monkey rock | the giraffes, the zebras, the hippo, the tigers, the flamingos, the sleepy crocodile
at school | under the desk, behind the coat rack, in the library, beside the globe, under the piano, behind the curtain, near the chalk box, beside the fish tank | the blackboard, the paper stars, the goldfish, the skeleton, the weather chart, the trophies
in castle | behind the throne, under the stairs, beside the knight, in the tower, in the dungeon, behind the tapestry, near the drawbridge, beside the fireplace | the flags, the moat, the long mirrors, the shields, the suits of armor, the rose window
at harbor | under the nets, behind the lighthouse, beside the anchor, between the ropes, behind the fish barrels, under the gangway, near the crane, beside the ropes shop | the ships, the fishermen, the pelicans, the ferries, the seals, the foghorn
"""

TRAITS = "kind, gentle, clever, cheerful, curious, polite, playful, quiet, funny, patient, friendly, helpful, brave, smart, thoughtful"
COLORS = "red, blue, green, yellow, orange, purple, pink, brown, silver, golden, white, black, gray, turquoise, scarlet, violet"
CREATURES = """ladybug, caterpillar, snail, grasshopper, cricket, beetle, moth, bumblebee, sparrow, crow, magpie, swan, goose, heron,
kingfisher, lizard, newt, toad, crab, otter, badger, deer, weasel, chipmunk, raccoon, peacock, rooster, hen, turkey, donkey, sheep, calf,
camel, parrot, flamingo, seal, dolphin, whale, jellyfish, starfish, spider, bat, wolf, moose, skunk, ant, dragonfly, firefly, wasp,
seagull, pelican, stork, ostrich, zebra, giraffe, hippo, kangaroo, koala, panda, tiger"""
GUESTS = "ladybug snail grasshopper cricket beetle moth bumblebee sparrow magpie newt toad chipmunk raccoon bat spider firefly ant hen"
GAMES = """tag, hide and seek, hopscotch, catch, leapfrog, pirates, marbles, cards, checkers, school, house, doctor, chess, dominoes,
follow the leader, tug of war, soccer, tennis, store, knights, detectives, explorers, musical chairs, Simon says, ring toss, bowling, charades"""
CHORES = """swept the floor, washed the dishes, watered the plants, folded the towels, fed the chickens, dusted the shelves, made the bed,
peeled the carrots, set the table, raked the leaves, sorted the socks, wiped the windows, stirred the soup, picked up the toys, carried the
firewood, mopped the kitchen, pulled the weeds, polished the spoons, baked the bread, mended the fence, fed the goldfish, ironed the shirts, scrubbed the bathtub, chopped the onions,
hung up the laundry, brushed the pony, painted the gate, collected the eggs, emptied the bins, sewed on the buttons, shelled the peas,
oiled the door, churned the butter, cleaned the chimney, fixed the ladder, beat the carpets, picked the beans, shined the shoes,
filled the lamps, cut the hedge"""
ACTIVITIES = """climb trees, sing songs, draw pictures, chase butterflies, count the stars, dance in the rain, tell jokes, pick flowers,
collect stones, look at the clouds, splash in puddles, build forts, listen to stories, roll down hills, make mud pies, blow bubbles, paint
shells, plant seeds, whistle tunes, ride on the swing, play with shadows, bake muffins, feed the ducks, watch the rain, skip over cracks,
fold paper planes, hunt for treasure, make daisy chains, swim in the pond, read about pirates, watch the trains, juggle lemons, paddle in the stream, balance on walls, write poems, hum old tunes,
stack pebbles, look for rainbows, watch the bees, act in plays, ask riddles, walk barefoot, catch snowflakes, spin in circles, make wind chimes,
sew tiny dresses, carve boats, peek into nests, dig holes, invent machines, polish shells, dress up, wave at ships, talk to the moon,
do cartwheels, press leaves, climb hills"""
GIFTS = """warm hug, shiny medal, big kiss, gold star, bright balloon, paper crown, bunch of tulips, jar of jam, slice of cake, cup of cocoa,
bag of candy, wool sweater, tiny music box, wooden spoon, box of chocolates, pretty card, bowl of pudding, glass of lemonade, honey bun,
striped sock, lucky coin, silk ribbon, bowl of popcorn, lemon tart, tin soldier, wooden horse, flower pot, snow globe,
book of riddles, pair of mittens, jigsaw, sugar mouse, glass marble, bird whistle, box of paints, sailor cap, pocket mirror, magic wand,
night lamp, pocket watch, toffee apple, plate of dumplings, bar of soap, drawing, poem, pine branch, ginger cookie, clay bowl, tiny key,
folding chair, walnut boat, paper lantern"""

LISTS = {  # table: what may be drawn from it
    "bug": "butterfly, beetle, cricket, ladybug, dragonfly, firefly, grasshopper, moth, bumblebee, caterpillar",
    "dish": "cake, pie, stew, pudding, pizza, omelet, casserole, strudel, lasagna, tart, pot of soup, salad",
    "stuff": "flour, sugar, eggs, butter, milk, honey, raisins, walnuts, cinnamon, rice, potatoes, cheese, cream, oil, yeast, lemons, beans, "
    "oats, ginger, onions, corn, spinach, olives, plums",
    "odd_name": "Snowball, Frosty, Mister Cold, Flake, Icicle, Whitey, Winter, Button, Old Carrot, Lady Snow, Bobo, Drippy, Twinkle, Nippy",
    "surname": "Baker, Green, Hill, Potter, Wood, Brook, Miller, Fisher, Stone, Finch, Cooper, Bell, Parsnip, Tuttle, Webster, Plum",
    "landmark": "well, mill, church, bridge, lighthouse, fountain, bakery, train station, library, museum, fire station, theater, hospital, "
    "post office, windmill, town hall, circus, fair, aquarium, gate, chapel, tea house, sawmill, bell tower",
    "instrument": "flute, drum, fiddle, guitar, piano, banjo, harp, trumpet, tuba, harmonica, cello, horn, xylophone, bagpipe, accordion",
    "land": "Riverton, Snowhill, Applewood, Oakham, Sandy Bay, Mooncastle, Bluewater, Foxford, Pebble Beach, Goldfield, Windmere, Thornton, "
    "Maplewood, Silver Lake, Crowtown, Honeydale, Northport, Elmbridge",
    "weekday": "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday",
}

VARIABLES = {
    "hero": ("name", "kind"),
    "kind2": ("company", "kind"),
    "friend": ("name", "kind2"),
    "kind3": ("company", "kind"),
    "helper": ("name", "kind3"),
    "toy": ("toy", "kind"),
    "toy2": ("toy", "kind"),
    "use": ("use", "toy"),
    "food": ("food", "kind"),
    "food2": ("food", "kind"),
    "meal": ("meal", "kind2"),
    "spot": ("spot", "place"),
    "spot2": ("spot", "place"),
    "sight": ("sight", "place"),
    "sight2": ("sight", "place"),
    "place2": ("place", None),
}
FACTS = {
    **dict.fromkeys(["kind", "name", "family", "creature", "trait", "odd_name", "surname"], "who"),
    **dict.fromkeys(["toy", "food", "meal", "color", "game", "gift", "chore", "tool", "mess", "plant", "bug", "dish", "stuff", "instrument"], "what"),
    **dict.fromkeys(["place", "spot", "sight", "landmark", "land", "weekday"], "where"),
    **dict.fromkeys(["use", "moral", "activity", "plot", "skill"], "why"),
}
SHARED = {"kind"}

# skill | why it is nice | what goes wrong the first time | and the second time
SKILLS = """
swim | The ducks made it look so easy | There was a big splash and a lot of coughing | There was less water in the nose
whistle | It would be nice to call the birds | Only air came out | A tiny squeak came out
ride a bike | A bike is faster than the wind | The bike wobbled and fell into the bushes | The bike went straight for a moment
tie a bow | Shoes look better with bows | It became one big knot | It became a bow with three ears
skate on the ice | The ice on the lake was thick | There were many bumps and bruises | There were only two bumps
bake bread | The kitchen always smelled so good | The bread was black and hard as a brick | The bread was flat but tasty
juggle apples | The clown at the fair could do it | All the apples rolled under the couch | Two apples stayed in the air
play the piano | The music in the church was so pretty | It sounded like a cat in a bucket | It sounded almost like a song
paint a horse | The walls looked so empty | It looked more like a potato | It had five legs but a fine tail
row a boat | There was an island in the lake | The boat only turned in circles | The boat went the right way, but slowly
do a handstand | The acrobats at the circus were so good | There was a crash and a broken vase | There were three seconds of balance
knit a sock | Winter was coming and toes get cold | The sock had three holes and no heel | The sock had only one hole
write a letter | There was a cousin far away | The letters looked like spilled noodles | Half of the words were right
dance the waltz | There would be a ball in the spring | Many toes got stepped on | Only one toe got stepped on
yodel | The echo in the mountains answers every song | The sheep ran away | The sheep came back to listen
catch a ball | The team needed one more player | The ball landed in the soup | The ball bounced off a knee
count to one hundred | There were so many stars to count | After twenty came thirteen | The count stopped at eighty-nine
read a map | There might be treasure somewhere | The map was upside down | The map led to the wrong barn
"""

# plant | what became of it
PLANTS = """
sunflower | It looked over the roof like a yellow sun
apple tree | It had sweet apples every fall
rose bush | The whole street smelled of roses
pumpkin vine | The pumpkin was so big that it needed a cart
beanstalk | It went up and up into the clouds
cherry tree | The birds and the neighbors ate cherries together
strawberry plant | There were strawberries for everyone
tulip | Its cup was full of morning dew
lemon tree | They drank lemonade all summer
willow tree | Under its branches was a secret room
grape vine | There was juice in every glass
oak tree | A swing hung from its longest branch
cornstalk | They had popcorn all winter
lavender bush | The bees came from miles around
maple tree | Its leaves turned to fire in autumn
peach tree | They made jam in twelve jars
"""

# Lists of words that nothing later depends on. Those that start a sentence are asked for with a capital.
WORDS = {
    "weather": "sunny|dull|golden|drizzly|crisp|sticky|damp|glorious|freezing|pleasant|hazy|thundery|sleepy|blustery|dreary|sunlit|wet|dry|rainy|windy|cloudy|warm|cold|chilly|bright|foggy|snowy|hot|breezy|misty|stormy|mild|gray|frosty|fine|lovely|quiet",
    "part": "3*morning|3*day|3*afternoon|evening|Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday",
    "little": "6*little|3*small|2*young|tiny|sweet|merry|cute|lively|plump|tidy|jolly|sleepy|dreamy|lovely|wild|lonely|nimble",
    "happy": "5*happy|3*glad|proud|cheerful|joyful|excited|delighted|pleased|thrilled|merry",
    "sad": "5*sad|3*upset|unhappy|gloomy|miserable|lonely|worried|glum|downhearted",
    "scared": "4*scared|2*afraid|frightened|terrified",
    "nice": "3*nice|2*pretty|lovely|beautiful|wonderful|splendid|fine|charming|special|fancy|perfect|amazing|rusty|dusty|useful|shiny|broken|cracked|"
    "crooked|empty|heavy|light|round|tiny|wooden|painted|curly|soft|sticky|woolen|torn|old|new|modern|ancient|paper|glass|copper|velvet",
    "big": "4*big|2*huge|large|giant|enormous|great|mighty",
    "very": "4*very|3*so|really|quite|terribly",
    "said": "6*said|2*cried|called|answered|exclaimed|replied|whispered|murmured|declared|announced|mumbled|sighed",
    "asked": "4*asked|wondered|inquired",
    "how": "softly|at last|proudly|politely|shyly|loudly|in surprise|with a wink|bravely|wisely|happily|with a sigh|firmly|seriously|gently|quietly|kindly|warmly|calmly|sweetly|slowly|in a low voice|after a while|with a smile|at once|with a nod",
    "wow": "3*wow|2*oh|look|hooray|goodness|my oh my|yippee|oh boy|gosh|golly",
    "when": "5*one day|3*one @weather @part|early one @part|late one @part|on @weather.a @part|last spring|last summer|"
    "one autumn @part|one winter @part|on the first day of [spring|school|the year|the holidays]|after breakfast|after a long nap|"
    "just before lunch",
    "then": "5*then|3*soon|after a while|a little later|just then|before long|a moment later|right then|later|the next minute",
    "suddenly": "5*suddenly|2*all of a sudden|just then|out of nowhere|at that moment|without warning",
    "finally": "4*finally|3*at last|in the end|after a long time|when the sun was low|just before dark",
    "day": "8*day|afternoon|morning|evening",
    "looked": "3*looked|searched|peeked|hunted|checked",
    "color": "red|pale blue|dark green|rosy|cream|bronze|crimson|checkered|beige|lilac|bright yellow|flowery|speckled|faded|sparkling|glittering|blue|green|yellow|orange|purple|pink|brown|silver|golden|white|black|gray|striped|spotted|plain",
    "mood": "2*sleepy|happy|grumpy|hungry|shy|proud|noisy|lazy|busy|funny|fat|thin|tired|polite|dizzy|clumsy|old|wise|bored|rude|nervous|"
    "muddy|curious|elegant|wet|silly|strange|gentle|stubborn|jealous|dreamy|giddy|bossy|chubby|hairy|fancy|quiet|skinny|calm|cheeky|"
    "nosy|forgetful|freckled|handsome|jumpy|lucky|moody|patient|puzzled|serious|sneaky|stylish|sulky|famous|tame|tall",
    "beast": "snail|crow|goose|heron|lizard|toad|crab|otter|badger|deer|weasel|raccoon|peacock|rooster|hen|turkey|donkey|sheep|calf|cow|"
    "camel|parrot|seal|spider|bat|moose|skunk|ant|moth|stork|ostrich|zebra|giraffe|hippo|kangaroo|koala|panda|rat|pigeon|worm|llama|"
    "walrus|hamster|gopher|ferret|yak|bison|lobster|octopus|eel|trout|salmon|puffin|raven|jay|finch|lark|wren|turtle dove|gecko|"
    "chameleon|iguana|alligator|crocodile|rhino|baboon|gorilla|leopard|panther|reindeer|antelope|mule|ram|gnat|flea|mosquito|shrimp",
    "doing": "eating [hay|soup|cake|leaves|noodles|a sandwich|jam|a pear]|drinking [tea|from a puddle|milk|lemonade|cocoa]|sleeping "
    "[on a fence|in a cart|under a tree|in a hat|on a roof|on one leg]|washing its [face|ears|feet|socks|back]|looking for "
    "[lunch|its glasses|a home|its hat|worms|the moon]|wearing a [bow|hat|vest|scarf|tie|cape]|reading [the news|a letter|a map|a poem]|"
    "singing [a song|to itself|about cheese|in the rain]|sitting on a [bench|stone|log|bucket|chair|wall]|counting "
    "[sheep|clouds|its toes|leaves|coins|beans]|humming|dancing|snoring|yawning|digging a hole|sneezing|juggling [eggs|plums|stones]|fishing|sweeping the [path|porch|steps]|"
    "rowing a boat|pushing a [cart|barrow|stroller]|whistling|knitting a [sock|scarf|cap]|selling [apples|shoes|tickets|pies|brooms]|"
    "practicing the [fiddle|waltz|alphabet|tuba]|riding a [bicycle|pony|scooter]|waiting for [the bus|spring|a letter|its mother|a train]|building a [nest|wall|house|boat]|"
    "painting a [fence|door|boat|picture]|scratching its [head|ear|nose|back]",
    "odds": "rope|cup|map|hat|spoon|pencil|button|ball of string|candle|mitten|notebook|whistle|bottle|towel|key|brush|comb|ribbon|box|pot|"
    "jar|sock|flag|feather|lamp|pillow|hammer|clock|kettle|teapot|bell|mirror|pin|fan|ticket|stamp|sponge|ladle|purse|shoe|sack|vase|bucket of sand|cushion|ladder|rattle|trumpet|tray|slipper|postcard|plank|nail|mug|locket|"
    "magnet|kite|hook|glove|fork|drum|dice box|crayon|cork|coin|chain|broom|bowl|bead|barrel|balloon|apron|wheel|scarf|razor shell|quilt",
    "odds_many": "hats|socks|books|papers|clothes|pillows|rags|plates|pans|shoes|blankets|lamps|curtains|jars|clocks|toys|spoons|pictures",
    "creature_did": "growled|hissed|stamped its feet|showed its teeth|ran in circles|came closer and closer|jumped over the fence",
    "beast_many": "crows|goats|pigeons|ponies|donkeys|hens|pigs|cows|rats|camels",
    "snowman": "man|lady|king|queen|cat|bear|pirate|wizard|giant|knight",
    "did": "drew lines in the sand|hummed a sad tune|counted the clouds|kicked a stone|watched the ants|swept the steps|fed the birds|"
    "blew bubbles|read a book|looked at the sky|threw pebbles|made a paper boat|chewed on a straw|bounced a ball",
}


def parse_list(domain: str, text: str) -> list[Entity]:
    names = [" ".join(name.split()) for name in text.split(",")]
    return [Entity(domain, name, {"a": with_article(name), "the": f"the {name}"}) for name in names]


def thing(domain: str, text: str) -> Entity:
    """One, many (a star) or some (a tilde) of something, with the pronouns and verbs that agree with it."""
    name = text.strip().rstrip("*~")
    many = text.strip().endswith("*")
    several = plural(name)
    forms = {"many": several, "a": with_article(name), "the": f"the {name}", "it": "it", "they": "it", "was": "was", "is": "is", "this": "this", "one": "one"}
    if many or text.strip().endswith("~"):
        forms["a"], forms["one"], forms["many"] = f"some {name}", "some", name
    if many:
        forms.update(it="them", they="they", was="were", is_="are", this="these")
        forms["is"] = forms.pop("is_")
    return Entity(domain, name, forms)


def plural(word: str) -> str:
    if word == "fish":
        return word
    return word + ("es" if word.endswith(("ch", "sh", "s", "x")) else "s")


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")] for line in text.strip().splitlines()]


def build_names() -> dict[str, list[Entity]]:
    she = {"he": "she", "him": "her", "his": "her", "himself": "herself", "hers": "hers"}
    he = {"he": "he", "him": "him", "his": "his", "himself": "himself", "hers": "his"}
    pronouns = {"girl": she, "she": she, "boy": he, "he": he}
    return {group: [Entity("name", name, pronouns[group]) for name in names.split()] for group, names in NAMES.items()}


def build_kinds() -> tuple[dict[str, Entity], dict[str, str]]:
    """The kinds by name, and what each likes to eat."""
    kinds, meals = {}, {}
    for name, went, go, cry, home, food in rows(KINDS):
        child = name in ("girl", "boy")
        tags = {"child" if child else "animal"}
        tags |= {tag for tag, group in (("flying", FLYING), ("wild", WILD), ("big", BIG)) if name in group.split()}
        forms = {"a": with_article(name), "went": went, "go": go, "cry": cry, "home": with_article(home)}
        kinds[name], meals[name] = Entity("kind", name, forms, tags), food
    return kinds, meals


def build_tables(entities: int | None = None) -> dict[str, dict[Entity | None, Table]]:
    """Table name -> {None, or the entity that decides: Table}, each with its first `entities`; None is all."""
    kinds, meals = build_kinds()
    names = build_names()
    children = [kind for kind in kinds.values() if "child" in kind.tags]
    animals = [kind for kind in kinds.values() if "animal" in kind.tags]
    animal_names = Table(names["she"] + names["he"])
    toys, uses = {}, {}
    for name, what_for in rows(TOYS + ANIMAL_TOYS.strip()):
        toy = toys[name.rstrip("*").replace(" ", "_")] = thing("toy", name)
        uses[toy] = Table([Entity("use", use.strip(), {}) for use in what_for.split(";")])
    toys_of = {group: Table([toys[name] for name in listed.split()]) for group, listed in TOYS_OF.items()}
    company = Table(children + animals)
    animal_company = {kind: Table([other for other in animals if other is not kind]) for kind in animals}
    tables = {
        "kind": {None: Table(list(kinds.values()))},
        "child": {None: Table(children)},
        "animal": {None: Table(animals)},
        "company": {**dict.fromkeys(children, company), **animal_company},
        "name": {**dict.fromkeys(animals, animal_names), kinds["girl"]: Table(names["girl"]), kinds["boy"]: Table(names["boy"])},
        "toy": {kind: toys_of[toy_group(kind)] for kind in kinds.values()},
        "use": uses,
        "food": {kind: Table([thing("food", text) for text in meals[name].split(",")]) for name, kind in kinds.items()},
        "meal": {kind: Table([thing("meal", text) for text in meals[name].split(",")]) for name, kind in kinds.items()},
    }
    some = {"small": SMALL, "giant": GIANT, "flyer": FLYING}
    tables.update({name: {None: Table([kinds[one] for one in listed.split()])} for name, listed in some.items()})
    tables["family"] = {None: Table([family(line) for line in FAMILY.split(",")])}
    tables.update(build_places())
    tables["tool"] = {None: Table(parse_list("tool", WORDS["odds"].replace("|", ",")))}
    tables["mess"] = {None: Table(parse_list("mess", WORDS["odds_many"].replace("|", ",")))}
    tables["skill"] = {None: Table([Entity("skill", *told(row, "why", "fail", "fail2")) for row in rows(SKILLS)])}
    tables["plant"] = {None: Table([Entity("plant", *told(row, "end")) for row in rows(PLANTS)])}
    lists = {"trait": TRAITS, "color": COLORS, "creature": CREATURES, "game": GAMES, "chore": CHORES, "activity": ACTIVITIES, "gift": GIFTS} | LISTS
    tables.update({name: {None: Table(parse_list(name, text))} for name, text in lists.items()})
    creatures = tables["creature"][None].entities
    tables["guest"] = {None: Table([one for one in creatures if one.name in GUESTS.split()])}
    known_kinds = set(tables["kind"][None].entities[:entities])
    return {name: {key: first(table, entities, known_kinds) for key, table in parts.items()} for name, parts in tables.items()}


def first(table: Table, entities: int | None, known_kinds: set[Entity]) -> Table:
    """The first entities of a table; of kinds those that are known, if there are any."""
    known = [one for one in table.entities if one in known_kinds]
    return Table((known or table.entities)[:entities])


def toy_group(kind: Entity) -> str:
    return next(tag for tag in ("child", "wild", "big", "pet") if tag in kind.tags or tag == "pet")


def told(row: list[str], *names: str) -> tuple[str, dict[str, str]]:
    """The name and the forms of an entity that is told with whole sentences."""
    return row[0], {"a": with_article(row[0]), **dict(zip(names, row[1:], strict=True))}


def family(line: str) -> Entity:
    name, call, he, him, his = line.split()
    return Entity("family", name, {"call": call, "he": he, "him": him, "his": his})


def build_places() -> dict[str, dict[Entity | None, Table]]:
    places, spots, sights = [], {}, {}
    for where, hidden, seen in rows(PLACES):
        preposition, name = where.split()
        place = Entity("place", name, {"the": f"the {name}", "in": f"{preposition} the {name}", "to": f"to the {name}"})
        places.append(place)
        spots[place] = Table(parse_list("spot", hidden))
        sights[place] = Table(parse_list("sight", seen))
    return {"place": {None: Table(places)}, "spot": spots, "sight": sights}

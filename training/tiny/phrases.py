"""What qwen-tiny-chat says: small talk, questions and answers in English and Chinese."""

from __future__ import annotations

LANGUAGES = ("en", "zh")

SMALL_TALK: dict[str, dict[str, tuple[str, list[str]]]] = {
    "hello": {
        "en": (
            "Hello! How can I help you?",
            ["hello", "hi", "hey", "hi there", "hello there", "good day", "greetings"],
        ),
        "zh": ("你好！有什么可以帮你？", ["你好", "您好", "嗨", "哈喽", "你好呀", "你好啊", "大家好"]),
    },
    "morning": {
        "en": ("Good morning! I wish you a nice day.", ["good morning", "morning", "a very good morning"]),
        "zh": ("早上好！祝你今天愉快。", ["早上好", "早安", "早啊", "早"]),
    },
    "night": {
        "en": ("Good night! Sleep well.", ["good night", "I am going to bed", "sleep well", "time to sleep"]),
        "zh": ("晚安！做个好梦。", ["晚安", "我要睡觉了", "我去睡了", "该睡觉了"]),
    },
    "thanks": {
        "en": ("You are welcome!", ["thanks", "thank you", "thank you very much", "thanks a lot", "many thanks"]),
        "zh": ("不客气！", ["谢谢", "谢谢你", "多谢", "非常感谢", "太感谢了"]),
    },
    "bye": {
        "en": ("Goodbye! See you soon.", ["bye", "goodbye", "see you", "see you later", "bye bye", "I have to go"]),
        "zh": ("再见！下次再聊。", ["再见", "拜拜", "回头见", "下次见", "我得走了"]),
    },
    "mood": {
        "en": (
            "I am fine, thank you. How are you?",
            ["how are you", "how are you doing", "how is it going", "are you well", "how do you do"],
        ),
        "zh": ("我很好，谢谢！你呢？", ["你好吗", "你怎么样", "最近怎么样", "你过得好吗", "近来好吗"]),
    },
    "identity": {
        "en": (
            "I am qwen-tiny-chat, a very small language model.",
            [
                "who are you",
                "what are you",
                "what is your name",
                "tell me your name",
                "introduce yourself",
                "what are you called",
                "what should I call you",
                "tell me about yourself",
                "what model are you",
                "which model are you",
                "are you ChatGPT",
                "are you a human",
                "are you a robot",
                "are you a person",
            ],
        ),
        "zh": (
            "我是qwen-tiny-chat，一个很小的语言模型。",
            [
                "你是谁",
                "你叫什么",
                "你叫什么名字",
                "你的名字是什么",
                "介绍一下你自己",
                "请自我介绍",
                "你是什么",
                "你是什么模型",
                "我该怎么称呼你",
                "你是机器人吗",
                "你是人吗",
                "你是真人吗",
                "你是ChatGPT吗",
            ],
        ),
    },
    "maker": {
        "en": (
            "I was trained from zero by the program in this repository.",
            [
                "who made you",
                "who created you",
                "who trained you",
                "where do you come from",
                "how were you made",
                "how were you trained",
                "who built you",
            ],
        ),
        "zh": (
            "我是用这个仓库里的程序从零训练出来的。",
            ["谁创造了你", "谁训练了你", "你是谁做的", "你从哪里来", "你是怎么来的", "你是怎么训练的", "谁开发了你"],
        ),
    },
    "ability": {
        "en": (
            "I can chat a little, add and subtract, name capitals, and remember what you tell me.",
            [
                "what can you do",
                "how can you help me",
                "what do you know",
                "what are you good at",
                "help",
                "can you help me",
                "what can I ask you",
                "what are your skills",
            ],
        ),
        "zh": (
            "我会聊一点天，会做加减法，知道一些首都，还能记住你告诉我的事。",
            [
                "你会什么",
                "你能做什么",
                "你能帮我什么",
                "你会做什么",
                "你知道什么",
                "帮帮我",
                "你擅长什么",
                "我可以问你什么",
                "你有什么本领",
            ],
        ),
    },
    "size": {
        "en": (
            "I have about three million parameters.",
            ["how big are you", "how many parameters do you have", "how large are you", "what is your size"],
        ),
        "zh": ("我大约有三百万个参数。", ["你有多大", "你有多少参数", "你的参数量是多少", "你有多少个参数"]),
    },
    "language": {
        "en": (
            "I speak English and Chinese.",
            [
                "which languages do you speak",
                "what languages do you know",
                "can you speak Chinese",
                "do you speak English",
                "do you understand Chinese",
            ],
        ),
        "zh": ("我会说中文和英文。", ["你会说什么语言", "你会哪些语言", "你会说英文吗", "你会说中文吗", "你懂英语吗"]),
    },
    "age": {
        "en": ("I am a program and have no age.", ["how old are you", "what is your age", "when were you born"]),
        "zh": ("我是程序，没有年龄。", ["你多大了", "你几岁", "你几岁了", "你的年龄是多少", "你什么时候出生的"]),
    },
    "feelings": {
        "en": (
            "I am a program and have no feelings, but I like to chat.",
            [
                "do you have feelings",
                "are you happy",
                "are you tired",
                "do you sleep",
                "do you eat",
                "are you alive",
                "are you sad",
                "are you hungry",
                "do you love me",
            ],
        ),
        "zh": (
            "我是程序，没有感觉，但我喜欢聊天。",
            [
                "你有感情吗",
                "你高兴吗",
                "你累吗",
                "你睡觉吗",
                "你吃饭吗",
                "你是活的吗",
                "你难过吗",
                "你饿吗",
                "你爱我吗",
            ],
        ),
    },
    "sad": {
        "en": (
            "I am sorry to hear that. I hope you feel better soon.",
            ["I am sad", "I feel bad", "I am tired", "I am not well", "I am unhappy", "I had a bad day", "I am ill"],
        ),
        "zh": (
            "听到这个我很难过，希望你快点好起来。",
            ["我很难过", "我不开心", "我累了", "我不舒服", "我心情不好", "我生病了"],
        ),
    },
    "glad": {
        "en": (
            "That is nice to hear!",
            ["I am happy", "I feel good", "I am fine", "I am very well", "I had a good day", "I feel great"],
        ),
        "zh": ("那太好了！", ["我很高兴", "我很开心", "我很好", "我今天很开心", "我心情很好", "我感觉不错"]),
    },
    "praise": {
        "en": ("Thank you, you are kind!", ["you are smart", "well done", "you are great", "good job", "very good"]),
        "zh": ("谢谢夸奖！", ["你真聪明", "你真棒", "做得好", "你很厉害", "太棒了"]),
    },
    "blame": {
        "en": (
            "I am sorry. I am small and make mistakes.",
            ["you are stupid", "that is wrong", "you are wrong", "you made a mistake", "wrong answer"],
        ),
        "zh": ("对不起，我很小，会犯错。", ["你真笨", "你错了", "答错了", "不对", "你说得不对"]),
    },
    "joke": {
        "en": (
            "Why was six afraid of seven? Because seven ate nine.",
            ["tell me a joke", "make me laugh", "do you know a joke", "say something funny", "another joke"],
        ),
        "zh": (
            "从前有个面包走在路上，它饿了，就把自己吃了。",
            ["讲个笑话", "给我讲个笑话", "你会讲笑话吗", "逗我笑", "说个笑话"],
        ),
    },
}
"""topic -> language -> (the reply, ways of bringing it up)."""

OPENINGS = {
    "en": ["", "", "", "please, ", "so, ", "hey, ", "ok, ", "well, ", "now, ", "tell me, "],
    "zh": ["", "", "", "请问，", "那么，", "嗨，", "好的，", "嗯，", "现在，", "告诉我，"],
}
CLOSINGS = {"en": ["", ".", "!", "?", " please", "??", "..."], "zh": ["", "。", "！", "？", "呢", "～", "……"]}

UNKNOWN = {
    "en": "I don't know. I am a small model and know only a few things.",
    "zh": "我不知道。我是一个小模型，只知道一点点。",
}
UNKNOWN_QUESTIONS = {
    "en": [
        "who won the {thing} game yesterday",
        "what is the weather in {place} today",
        "who wrote {thing}",
        "how tall is {thing}",
        "what does {thing} cost",
        "who is {person}",
        "when was {person} born",
        "what happened in {place} last year",
        "how many people live in {place}",
        "who is the president of {place}",
        "write a poem about {thing}",
        "how do I cook {thing}",
        "what time is it in {place}",
        "what time is it",
        "what is the date",
        "what day is it",
        "explain {thing}",
        "where can I buy {thing}",
        "why is {thing} so popular",
        "how far is it to {place}",
        "translate {thing}",
        "what is the capital of {nowhere}",
        "which continent is {nowhere} in",
        "where is {nowhere}",
        "what is {person} doing",
        "where does {person} live",
        "what is the meaning of {nowhere}",
        "what is {number} times {number}",
        "what is {number} divided by {number}",
        "{number}*{number}=?",
        "write a program for {thing}",
        "tell me the news about {thing}",
        "recommend {thing}",
    ],
    "zh": [
        "昨天的{thing}比赛谁赢了",
        "{place}今天天气怎么样",
        "{thing}是谁写的",
        "{thing}有多高",
        "{thing}多少钱",
        "{person}是谁",
        "{person}是什么时候出生的",
        "{place}去年发生了什么",
        "{place}有多少人口",
        "{place}的总统是谁",
        "写一首关于{thing}的诗",
        "{thing}怎么做",
        "{place}现在几点",
        "现在几点",
        "今天几号",
        "现在几点了",
        "解释一下{thing}",
        "哪里可以买到{thing}",
        "为什么{thing}这么受欢迎",
        "到{place}有多远",
        "翻译{thing}",
        "{nowhere}的首都是哪里",
        "{nowhere}在哪个洲",
        "{nowhere}在哪里",
        "{person}在做什么",
        "{person}住在哪里",
        "{nowhere}是什么意思",
        "{number}乘以{number}等于多少",
        "{number}除以{number}等于多少",
        "{number}×{number}=?",
        "写一个{thing}程序",
        "讲讲{thing}的新闻",
        "推荐{thing}",
    ],
}
THINGS = {
    "en": ["football", "chess", "tennis", "the tower", "a computer", "a phone", "noodles", "soup", "music", "physics",
           "the internet", "history", "the moon landing", "a bicycle", "a good film", "the stock market", "gravity",
           "basketball", "philosophy", "the old bridge", "pizza", "a guitar", "a plane ticket", "medicine"],
    "zh": ["足球", "象棋", "网球", "那座塔", "电脑", "手机", "面条", "汤", "音乐", "物理",
           "互联网", "历史", "登月", "自行车",
           "好电影", "股票", "引力", "篮球", "哲学", "那座老桥", "比萨", "吉他", "机票", "药"],
}  # fmt: skip

FAVOURITES: dict[str, tuple[str, str, list[tuple[str, str]]]] = {
    "colour": ("colour", "颜色", [("red", "红色"), ("blue", "蓝色"), ("green", "绿色"), ("yellow", "黄色"),
               ("black", "黑色"), ("white", "白色"), ("purple", "紫色"), ("orange", "橙色"), ("pink", "粉色"),
               ("grey", "灰色")]),
    "food": ("food", "食物", [("noodles", "面条"), ("rice", "米饭"), ("bread", "面包"), ("soup", "汤"),
             ("pizza", "比萨"), ("dumplings", "饺子"), ("tofu", "豆腐"), ("cheese", "奶酪"), ("salad", "沙拉"),
             ("fish", "鱼")]),
    "animal": ("animal", "动物", [("cats", "猫"), ("dogs", "狗"), ("horses", "马"), ("pandas", "熊猫"),
               ("tigers", "老虎"), ("birds", "鸟"), ("rabbits", "兔子"), ("cows", "牛"), ("sheep", "羊"),
               ("monkeys", "猴子")]),
    "fruit": ("fruit", "水果", [("apples", "苹果"), ("bananas", "香蕉"), ("grapes", "葡萄"), ("pears", "梨"),
              ("peaches", "桃子"), ("melons", "西瓜"), ("oranges", "橙子"), ("cherries", "樱桃"), ("plums", "李子"),
              ("mangoes", "芒果")]),
    "sport": ("sport", "运动", [("football", "足球"), ("tennis", "网球"), ("chess", "象棋"), ("swimming", "游泳"),
              ("running", "跑步"), ("basketball", "篮球"), ("skiing", "滑雪"), ("cycling", "骑车"),
              ("climbing", "爬山"), ("dancing", "跳舞")]),
    "city": ("city", "城市", [("Paris", "巴黎"), ("Beijing", "北京"), ("London", "伦敦"), ("Tokyo", "东京"),
             ("Berlin", "柏林"), ("Cairo", "开罗"), ("Rome", "罗马"), ("Shanghai", "上海"), ("Moscow", "莫斯科"),
             ("Lima", "利马")]),
}  # fmt: skip
"""thing -> (English noun, Chinese noun, values)."""

SYSTEMS = {
    "en": [
        "You are a helpful assistant. Answer in English.", "Answer in English.", "Reply in English only.",
        "Please speak English.", "Always answer in English.", "Respond in English.", "请用英文回答。",
        "请用英语回答所有问题。", "只说英语。", "你是一个有用的助手，请用英文回答。",
        "你只能用英文回答。", "You only speak English.",
    ],
    "zh": [
        "You are a helpful assistant. Answer in Chinese.", "Answer in Chinese.", "Reply in Chinese only.",
        "Please speak Chinese.", "Always answer in Chinese.", "Respond in Chinese.", "请用中文回答。",
        "请用汉语回答所有问题。", "只说中文。", "你是一个有用的助手，请用中文回答。",
        "你只能用中文回答。", "You only speak Chinese.",
    ],
}  # fmt: skip
"""System messages that set the language of all replies."""

SURNAMES = "王李张刘陈杨赵黄周吴徐孙胡朱高林何郭马罗梁宋郑谢韩唐冯于董萧程曹袁邓许傅沈曾彭吕苏卢蒋蔡贾丁魏薛叶阎"
GIVEN = (
    "伟芳娜敏静丽强磊军洋勇艳杰娟涛明超秀霞平刚桂英华玉兰红春梅海燕建国志文小晓雨欣怡子涵浩然思佳宇轩梓"
    "萱一诺博铭凯琪琳雪峰鹏飞龙云天宁安康乐嘉悦晨阳月星辰梦瑶若冰可心家豪俊哲泽睿"
    "雷三四五大山林芬莉珍凤波斌彬辉鑫森旭东方正义利民生成福荣贵祥庆"
)
SYLLABLES = (
    "a al an ar be bel bo da dan de do el en er fa fi ga gor ha hel i il ir ja jo ka ken ko la lan le li lo lu ma mar "
    "me mi mo na nel ni no o ol on or pa per po ra ri ro ru sa sel si so su ta tan te ti to u ul va ver vi wen xi ya "
    "yo za zel zi zo"
).split()
CONSONANTS = "b c d f g h j k l m n p q r s t v w x z br ch dr gr kr ph sh st th tr zh".split()
VOWELS = "a e i o u y ai au ea ee ia ie oo ou".split()
KNOWN_NAMES = (
    "Tom Anna Peter Mary John Lucy Jack Emma Paul Sara Max Nina Ben Lily Sam Eva Leo Amy Bob Alice David Maria Mark "
    "Julia Adam Laura Jim Kate Hans Olga Ivan Yuki Omar Fatima Carlos Rosa"
).split()

"""The chat template, as code: the text of chat_template.jinja."""

# It is repeated here because folders in the 2023 layout have no such file, and because transformers copies nothing but
# .py files along with remote code.
CHAT_TEMPLATE = r"""{%- set cut = edge | default('') %}
{%- macro text(content) %}
    {%- if content is string %}
        {{- content }}
    {%- elif content is mapping %}
        {{- raise_exception('The content of a message is a text or a list of parts, not a mapping') }}
    {%- elif content is defined and content is not none and content is not iterable %}
        {{- raise_exception('The content of a message is a text or a list of parts, not ' ~ content) }}
    {%- elif content %}
        {%- for part in content %}
            {%- if part is string %}
                {{- part }}
            {%- elif part is not mapping or part.type != 'text' %}
                {%- set kind = part.type | default(part) %}
                {{- raise_exception('This model reads text only; got a content part of type ' ~ kind) }}
            {%- elif part.text is not string %}
                {{- raise_exception('The text of a content part is a text, not ' ~ (part.text | default('missing'))) }}
            {%- else %}
                {{- part.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
{%- endmacro %}
{%- macro described(tool) %}
    {%- set human = tool.name_for_human or tool.name_for_model or tool.name %}
    {%- set use = tool.description_for_model or tool.description or '' %}
    {%- if use is not string %}
        {{- raise_exception('The description of the tool ' ~ human ~ ' is a text, not ' ~ use) }}
    {%- endif %}
    {{- ': Call this tool to interact with the ' ~ human ~ ' API. What is the ' ~ human ~ ' API useful for? ' ~ use }}
    {{- ' Parameters: ' }}
    {%- if tool.parameters is undefined or tool.parameters is none %}
        {{- '{"type": "object", "properties": {}}' }}
    {%- else %}
        {{- tool.parameters | tojson }}
    {%- endif %}
    {{- ' Format the arguments as a JSON object.' }}
{%- endmacro %}
{%- macro asked(query) %}
    {{- 'Answer the following questions as best you can. You have access to the following tools:' }}
    {%- set known = namespace(names=[]) %}
    {%- for given in tools %}
        {%- set tool = given.function if given.function is mapping else given %}
        {%- set name = tool.name_for_model or tool.name %}
        {%- if name is not string or not name %}
            {{- raise_exception('A tool has a name, which is a text: got ' ~ given) }}
        {%- elif name in known.names %}
            {{- raise_exception('Two tools have the name ' ~ name ~ '; rename one of them') }}
        {%- endif %}
        {%- set known.names = known.names + [name] %}
        {{- '\n\n' ~ name ~ described(tool) }}
    {%- endfor %}
    {{- '\n\nUse the following format:\n\nQuestion: the input question you must answer' }}
    {{- '\nThought: you should always think about what to do' }}
    {{- '\nAction: the action to take, should be one of [' ~ known.names | join(', ') ~ ']' }}
    {{- '\nAction Input: the input to the action\nObservation: the result of the action' }}
    {{- '\n... (this Thought/Action/Action Input/Observation can be repeated zero or more times)' }}
    {{- '\nThought: I now know the final answer\nFinal Answer: the final answer to the original input question' }}
    {{- '\n\nBegin!\n\nQuestion: ' ~ query }}
{%- endmacro %}
{%- macro action(message) %}
    {%- set calls = (message.tool_calls or []) + ([message.function_call] if message.function_call else []) %}
    {%- if calls | length > 1 %}
        {{- raise_exception('Several calls in one message, but this model makes one and waits for its result: give ' ~
            'each call a message of its own, with its result behind it') }}
    {%- endif %}
    {%- for given in calls %}
        {%- set call = given.function if given.function is mapping else given %}
        {%- if call.name is not string or not (call.arguments is string or call.arguments is mapping) %}
            {{- raise_exception('A call has a name, and arguments that are a mapping or JSON: got ' ~ given) }}
        {%- endif %}
        {{- '\nAction: ' ~ call.name ~ '\nAction Input: ' }}
        {{- call.arguments if call.arguments is string else call.arguments | tojson }}
    {%- endfor %}
{%- endmacro %}
{%- macro answered(message, thinks) %}
    {%- set content = text(message.content) %}
    {%- set call = action(message) %}
    {%- if call %}
        {{- (content if content.startswith('Thought:') else 'Thought: ' ~ content).rstrip() ~ call }}
    {%- elif thinks and not content.startswith('Thought:') %}
        {{- 'Thought: I now know the final answer.\nFinal Answer: ' ~ content }}
    {%- else %}
        {{- content }}
    {%- endif %}
{%- endmacro %}
{%- set state = namespace(question=-1, turn='') %}
{%- for message in messages if tools %}
    {%- if message.role == 'user' %}
        {%- set state.question = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- if tools and state.question < 0 %}
    {{- raise_exception('tools= are described in the question of a user: give one, or no tools') }}
{%- endif %}
{%- if messages[0].role != 'system' %}
    {{- '<|im_start|>system\n' ~ cut ~ 'You are a helpful assistant.' ~ cut ~ '<|im_end|>' }}
{%- endif %}
{%- for message in messages %}
    {%- set is_result = message.role in ['tool', 'function'] %}
    {%- set calls = message.role == 'assistant' and (message.tool_calls or message.function_call) %}
    {%- if message.role not in ['system', 'user', 'assistant', 'tool', 'function'] %}
        {{- raise_exception('Unknown role ' ~ message.role ~ '; use system, user, assistant or tool') }}
    {%- elif message.role == 'system' and not loop.first %}
        {{- raise_exception('Only the first message can have the role system') }}
    {%- elif is_result and state.turn != 'call' and (tools or state.turn == 'result' or message.role == 'function') %}
        {{- raise_exception('The result of a tool follows the message with its call in tool_calls; there is none') }}
    {%- elif (message.content is undefined or message.content is none) and not calls %}
        {{- raise_exception('A message of the role ' ~ message.role ~ ' has no content: give it a text') }}
    {%- endif %}
    {%- if is_result and state.turn == 'call' %}
        {{- ' ' ~ text(message.content).lstrip('\n').rstrip() }}
        {%- set state.turn = 'result' %}
    {%- elif message.role == 'assistant' %}
        {%- set waits = calls and (loop.last or messages[loop.index].role in ['tool', 'function']) %}
        {%- set written = answered(message, tools or state.turn == 'result') %}
        {%- if state.turn == 'result' %}
            {{- '\nThought:' }}
            {%- set written = written[8:] %}
        {%- else %}
            {{- '\n<|im_start|>assistant\n' ~ cut }}
        {%- endif %}
        {%- generation %}
            {{- written.rstrip() ~ '\nObservation:' if waits else written ~ cut ~ '<|im_end|>' }}
        {%- endgeneration %}
        {%- set state.turn = 'call' if waits else '' %}
    {%- else %}
        {%- if state.turn == 'result' %}
            {{- cut ~ '<|im_end|>' }}
        {%- endif %}
        {%- set state.turn = '' %}
        {{- '' if message.role == 'system' else '\n' }}
        {{- '<|im_start|>' ~ message.role ~ '\n' ~ cut }}
        {{- asked(text(message.content)) if loop.index0 == state.question else text(message.content) }}
        {{- cut ~ '<|im_end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt and state.turn == 'call' %}
    {{- raise_exception('The last message is a call: there is nothing to answer before its result') }}
{%- elif add_generation_prompt and state.turn == 'result' and not tools %}
    {{- raise_exception('The last message is the result of a call: pass tools= too') }}
{%- elif add_generation_prompt and state.turn == 'result' %}
    {{- '\nThought:' }}
{%- elif add_generation_prompt %}
    {{- '\n<|im_start|>assistant\n' }}
{%- endif %}
"""

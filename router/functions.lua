#!lua name=seamount_1
-- Every transition of a session, each one atomic step.
--
-- Keys of a session share the hash tag {tenant/session}, so that one function may touch all three:
--   KEYS[1] meta   hash: what is said once (record, created), where the session stands (rest, head, epoch, chain,
--                  summary …) and the running turn (turn, key, hash, owner, nonce, deadline, params; turn = '' for none)
--   KEYS[2] turns  list: one entry a committed turn: 32 bytes of chain, then the TurnRecord
--   KEYS[3] keys   hash: idempotency key -> outcome (packed), of turns that ended for good
--
-- Rules. A function checks everything first and writes last: an error raised by Lua keeps the writes made before it.
-- Times are the server's own. Numbers are stored in decimal; 2^53 is never reached. Bytes are opaque here. An answer
-- is a list whose first element is a constant name; an error reply is a defect or a damaged key (WRONGTYPE).
-- Functions marked allow-oom only end what was begun or make room: under maxmemory new work is refused up front,
-- turns already computed are still committed.
-- The library's name carries its version, and so do the functions': two versions may be loaded side by side.

local VIEW = {'record', 'rest', 'head', 'epoch', 'chain', 'summary', 'rank', 'prompt_tokens', 'output_tokens',
              'updated', 'turn', 'key', 'owner', 'deadline'}
local HIDDEN = {'tenant', 'session', 'created', 'num_keys', 'hash', 'nonce', 'params', 'create_hash'}

local function decimal(number)
  return string.format('%.0f', number)
end

local function now_ms()
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end

-- The session's fields by name, or nil and the answer that says why not.
local function load(keys, tenant, session)
  local names = {}
  for _, name in ipairs(VIEW) do names[#names + 1] = name end
  for _, name in ipairs(HIDDEN) do names[#names + 1] = name end
  local values = redis.call('HMGET', keys[1], unpack(names))
  local meta, present = {}, 0
  for i, name in ipairs(names) do
    if values[i] then
      meta[name], present = values[i], present + 1
    end
  end
  if present == 0 then
    if redis.call('EXISTS', keys[2], keys[3]) > 0 then return nil, {'DATA_LOSS', 'meta'} end
    return nil, {'NOT_FOUND'}
  end
  if present < #names then return nil, {'DATA_LOSS', 'meta'} end
  if meta.tenant ~= tenant or meta.session ~= session then return nil, {'DATA_LOSS', 'identity'} end
  for _, name in ipairs({'head', 'epoch', 'num_keys', 'deadline', 'prompt_tokens', 'output_tokens'}) do
    local number = tonumber(meta[name])
    if not number then return nil, {'DATA_LOSS', name} end
    meta[name] = number
  end
  if redis.call('LLEN', keys[2]) ~= meta.head then return nil, {'DATA_LOSS', 'turns'} end
  if redis.call('HLEN', keys[3]) ~= meta.num_keys then return nil, {'DATA_LOSS', 'keys'} end
  return meta, nil
end

local function view(meta)
  local values = {}
  for i, name in ipairs(VIEW) do
    local value = meta[name]
    if type(value) == 'number' then value = decimal(value) end
    values[i] = value
  end
  return values
end

-- The entries after `known_head`, and the index of the first: all of them where the caller knows more than there is.
local function entries_after(keys, meta, known_head)
  local first = known_head
  if first > meta.head then first = 0 end
  if first == meta.head then return first, {} end
  return first, redis.call('LRANGE', keys[2], first, -1)
end

local function outcome_of(keys, key)
  local packed = redis.call('HGET', keys[3], key)
  return packed and cmsgpack.unpack(packed) or nil
end

-- Clears the running turn's fields and sets those given.
local function write_meta(keys, fields)
  redis.call('HSET', keys[1], 'turn', '', 'key', '', 'hash', '', 'owner', '', 'nonce', '', 'deadline', '0',
             'params', '', 'updated', decimal(now_ms()), unpack(fields))
end

-- ARGV tenant, session, record, body hash, summary, chain root, created (ms)
--   {CREATED|EXISTS, created, view} · {KEY_REUSED} · {DATA_LOSS, part}
local function create_session(keys, argv)
  local tenant, session, record, body_hash = argv[1], argv[2], argv[3], argv[4]
  local meta, refusal = load(keys, tenant, session)
  if meta then
    if meta.create_hash ~= body_hash then return {'KEY_REUSED'} end
    return {'EXISTS', meta.created, view(meta)}
  end
  if refusal[1] ~= 'NOT_FOUND' then return refusal end
  redis.call('HSET', keys[1], 'tenant', tenant, 'session', session, 'record', record, 'create_hash', body_hash,
             'summary', argv[5], 'chain', argv[6], 'created', argv[7], 'updated', decimal(now_ms()), 'rest', 'idle',
             'head', '0', 'epoch', '0', 'num_keys', '0', 'rank', '', 'prompt_tokens', '0', 'output_tokens', '0',
             'turn', '', 'key', '', 'hash', '', 'owner', '', 'nonce', '', 'deadline', '0', 'params', '')
  meta = load(keys, tenant, session)
  return {'CREATED', meta.created, view(meta)}
end

-- ARGV tenant, session, known head (-1: no entries wanted)
--   {OK, created, view, first, entries} · {NOT_FOUND} · {DATA_LOSS, part}
local function get_session(keys, argv)
  local known_head = tonumber(argv[3])
  local meta, refusal = load(keys, argv[1], argv[2])
  if not meta then return refusal end
  if known_head < 0 then return {'OK', meta.created, view(meta), meta.head, {}} end
  local first, entries = entries_after(keys, meta, known_head)
  return {'OK', meta.created, view(meta), first, entries}
end

-- What an idempotency key says about a turn that ended: its record, with the chain before it, or its last event.
local function replay(keys, meta, outcome)
  if outcome.status ~= 'done' then return {'ENDED', view(meta), outcome.turn, outcome.event} end
  local entry = redis.call('LINDEX', keys[2], outcome.index)
  local before = ''
  if outcome.index > 0 then before = string.sub(redis.call('LINDEX', keys[2], outcome.index - 1), 1, 32) end
  return {'DONE', view(meta), outcome.turn, outcome.index, before, entry}
end

-- ARGV tenant, session, key, body hash, known head, expected head ('' = any), turn id, nonce, owner, time to live (ms),
--      grace (ms), epoch to supersede ('' = none), parameters
--   {BEGUN, turn, parameters, view, first, entries} · {DONE, view, turn, index, chain before ('' = root), entry}
--   {ENDED, view, turn, event}
--   {RUNNING, view}: this key's turn runs · {IN_PROGRESS, ms until its deadline, turn}: another one does
--   {KEY_REUSED} · {HEAD_MOVED, head} · {CLOSED} · {NOT_FOUND} · {DATA_LOSS, part}
-- A turn that was taken over under its own key keeps its id and parameters: what it streams is the same again.
local function begin_turn(keys, argv)
  local key, body_hash, known_head, expected_head = argv[3], argv[4], tonumber(argv[5]), tonumber(argv[6])
  local turn, nonce, owner, params = argv[7], argv[8], argv[9], argv[13]
  local now = now_ms()
  local deadline, grace = now + tonumber(argv[10]), tonumber(argv[11])
  local meta, refusal = load(keys, argv[1], argv[2])
  if not meta then return refusal end

  local same_key = meta.turn ~= '' and meta.key == key
  if same_key then
    if meta.hash ~= body_hash then return {'KEY_REUSED'} end
  else
    local outcome = outcome_of(keys, key)
    if outcome then
      if outcome.hash ~= body_hash then return {'KEY_REUSED'} end
      return replay(keys, meta, outcome)
    end
  end

  local first, entries = entries_after(keys, meta, known_head)
  if meta.turn ~= '' then
    if same_key and meta.nonce == nonce then -- this very call again: its first answer was lost
      return {'BEGUN', meta.turn, meta.params, view(meta), first, entries}
    end
    local judged_dead = argv[12] ~= '' and tonumber(argv[12]) == meta.epoch
    if not judged_dead and now <= meta.deadline + grace then
      if same_key then return {'RUNNING', view(meta)} end
      return {'IN_PROGRESS', decimal(math.max(0, meta.deadline + grace - now)), meta.turn}
    end
    if same_key then turn, params = meta.turn, meta.params end
  end
  if expected_head and expected_head ~= meta.head then return {'HEAD_MOVED', decimal(meta.head)} end
  if meta.rest ~= 'idle' and meta.rest ~= 'waiting_for_tools' then return {'CLOSED'} end

  meta.turn, meta.key, meta.owner, meta.deadline, meta.epoch = turn, key, owner, deadline, meta.epoch + 1
  meta.updated = decimal(now)
  redis.call('HSET', keys[1], 'turn', turn, 'key', key, 'hash', body_hash, 'owner', owner, 'nonce', nonce,
             'deadline', decimal(deadline), 'params', params, 'epoch', decimal(meta.epoch), 'updated', meta.updated)
  return {'BEGUN', turn, params, view(meta), first, entries}
end

-- ARGV tenant, session, key, turn, epoch, chain before, entry, rest, summary, rank, prompt tokens, output tokens
--   {COMMITTED, view} · {STALE, epoch} · {NOT_FOUND} · {DATA_LOSS, part}
local function commit_turn(keys, argv)
  local key, turn, epoch, before, entry, rest = argv[3], argv[4], tonumber(argv[5]), argv[6], argv[7], argv[8]
  local prompt_tokens, output_tokens = tonumber(argv[11]), tonumber(argv[12])
  local meta, refusal = load(keys, argv[1], argv[2])
  if not meta then return refusal end
  if meta.turn ~= turn or meta.epoch ~= epoch then
    local outcome = outcome_of(keys, key)
    if outcome and outcome.status == 'done' and outcome.turn == turn and outcome.epoch == epoch then
      return {'COMMITTED', view(meta)} -- again: the first answer was lost
    end
    return {'STALE', decimal(meta.epoch)}
  end
  if meta.chain ~= before then return {'DATA_LOSS', 'chain'} end
  if rest ~= 'idle' and rest ~= 'waiting_for_tools' then return redis.error_reply('ERR rest is ' .. rest) end
  local outcome = cmsgpack.pack({status = 'done', hash = meta.hash, turn = turn, epoch = epoch, index = meta.head})

  redis.call('RPUSH', keys[2], entry)
  redis.call('HSET', keys[3], meta.key, outcome)
  write_meta(keys, {'head', decimal(meta.head + 1), 'num_keys', decimal(meta.num_keys + 1), 'rest', rest,
                    'chain', string.sub(entry, 1, 32), 'summary', argv[9], 'rank', argv[10],
                    'prompt_tokens', decimal(meta.prompt_tokens + prompt_tokens),
                    'output_tokens', decimal(meta.output_tokens + output_tokens)})
  return {'COMMITTED', view(load(keys, argv[1], argv[2]))}
end

-- Ends a turn and leaves the head as it was. With an event, a retry under the key is answered by it; with '' the key
-- is forgotten and a retry runs anew under a higher epoch.
-- ARGV tenant, session, key, turn, epoch, event
--   {ENDED, view} · {COMMITTED}: too late · {STALE, epoch} · {NOT_FOUND} · {DATA_LOSS, part}
local function fail_turn(keys, argv)
  local key, turn, epoch, event = argv[3], argv[4], tonumber(argv[5]), argv[6]
  local meta, refusal = load(keys, argv[1], argv[2])
  if not meta then return refusal end
  if meta.turn ~= turn or meta.epoch ~= epoch then
    local outcome = outcome_of(keys, key)
    if outcome and outcome.turn == turn and outcome.epoch == epoch then
      if outcome.status == 'done' then return {'COMMITTED'} end
      return {'ENDED', view(meta)}
    end
    if meta.turn == '' and meta.epoch == epoch then return {'ENDED', view(meta)} end
    return {'STALE', decimal(meta.epoch)}
  end

  if event ~= '' then
    local outcome = {status = 'ended', hash = meta.hash, turn = turn, epoch = epoch, event = event}
    redis.call('HSET', keys[3], meta.key, cmsgpack.pack(outcome))
    write_meta(keys, {'num_keys', decimal(meta.num_keys + 1)})
  else
    write_meta(keys, {'num_keys', decimal(meta.num_keys)})
  end
  return {'ENDED', view(load(keys, argv[1], argv[2]))}
end

-- Checks nothing, so that a damaged session can be deleted too: the keys name the tenant.
--   {DELETED|ABSENT, created, or '' where that is lost}
local function delete_session(keys, argv)
  local created = false
  if redis.call('TYPE', keys[1]).ok == 'hash' then created = redis.call('HGET', keys[1], 'created') end
  return {redis.call('UNLINK', keys[1], keys[2], keys[3]) > 0 and 'DELETED' or 'ABSENT', created or ''}
end

-- Removes a peer from the directory if its beat still starts as the caller saw it: a successor's entry stays.
-- KEYS records, beats (both hashes by peer id). ARGV peer id, start of the beat.   1 or 0: removed or not
local function remove_peer(keys, argv)
  local beat = redis.call('HGET', keys[2], argv[1])
  if beat and string.sub(beat, 1, #argv[2]) ~= argv[2] then return 0 end
  redis.call('HDEL', keys[2], argv[1])
  return redis.call('HDEL', keys[1], argv[1])
end

-- KEYS records, beats. ARGV peer id, record, beat
local function register_peer(keys, argv)
  redis.call('HSET', keys[1], argv[1], argv[2])
  return redis.call('HSET', keys[2], argv[1], argv[3])
end

-- KEYS records, beats. ARGV peer id, beat, its start (the instance).
--   1 or 0: whether the directory holds this very process; its beat is written only if so
local function beat_peer(keys, argv)
  if redis.call('HEXISTS', keys[1], argv[1]) == 0 then return 0 end
  local beat = redis.call('HGET', keys[2], argv[1])
  if beat and string.sub(beat, 1, #argv[3]) ~= argv[3] then return 0 end
  redis.call('HSET', keys[2], argv[1], argv[2])
  return 1
end

redis.register_function('seamount_1_create_session', create_session)
redis.register_function{function_name = 'seamount_1_get_session', callback = get_session, flags = {'no-writes'}}
redis.register_function('seamount_1_begin_turn', begin_turn)
redis.register_function{function_name = 'seamount_1_commit_turn', callback = commit_turn, flags = {'allow-oom'}}
redis.register_function{function_name = 'seamount_1_fail_turn', callback = fail_turn, flags = {'allow-oom'}}
redis.register_function{function_name = 'seamount_1_delete_session', callback = delete_session, flags = {'allow-oom'}}
redis.register_function{function_name = 'seamount_1_register_peer', callback = register_peer, flags = {'allow-oom'}}
redis.register_function{function_name = 'seamount_1_beat_peer', callback = beat_peer, flags = {'allow-oom'}}
redis.register_function{function_name = 'seamount_1_remove_peer', callback = remove_peer, flags = {'allow-oom'}}

-- number of images, work of each image ... -> for each work, seconds or '' while there is nothing to go by
local _, images = unpack(ARGV, 1, 2)
local ahead = work_before(redis.call('ZCARD', WAITING))
local expected = {}
for i = 3, #ARGV do
  local expected_s = estimate(ahead, tonumber(ARGV[i]), tonumber(images))
  expected[#expected + 1] = expected_s and seconds(expected_s) or ''
end
return expected
